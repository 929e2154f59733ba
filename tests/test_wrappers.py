"""Models in their wrappers: patched, compressed, asked and unpatched through them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tokprune
from tokprune.errors import UnsupportedModelError
from tokprune.families import bind, unwrap
from tokprune.inputs.prompts import add_token_types
from tokprune.testing import assert_same_logits, tiny, tiny_family
from tokprune.testing.checks.leftovers import fingerprint

PROMPTS = [[4, "image", 6], [7, "image", 9]]
FAMILIES = ["llava-1.5", "llava-next", "qwen2.5-vl", "qwen3-vl", "gemma3"]
METHODS: dict[str, dict[str, Any]] = {
    "fastv": {"keep": 7},
    "visionzip": {"dominant": 5, "contextual": 2},
    "sparsevlm": {"keep": 5, "prune_before": (2, 4), "recycle": 0},
    "transprune": {"keep": (8, 5), "prune_before": (2, 4), "transition_layers": (1, 3)},
}


class ValueHead(nn.Module):
    """As trl builds them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Linear(32, 1)

    def forward(self, **inputs: Any) -> Any:
        return self.pretrained_model(**inputs)


class Pipeline:
    """No module, but it holds one, as transformers' pipelines and trainers do."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "data parallel": nn.DataParallel,
    "value head": ValueHead,
    "pipeline": Pipeline,
    "trainer of wrappers": lambda model: Pipeline(nn.DataParallel(ValueHead(model))),
    "sequential": lambda model: ValueHead(ValueHead(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("family", ["llava-1.5", "qwen2.5-vl"])
def test_every_verb_looks_through(family: str, wrapper: str) -> None:
    model = tiny_family(family).build()
    inputs = tiny_family(family).inputs(model, PROMPTS)
    wrapped = WRAPPERS[wrapper](model)
    with torch.no_grad():
        plain = model(**inputs).logits
        before = fingerprint(model)
        with tokprune.compress(model, "fastv", keep=7):
            want = model(**inputs).logits
        with tokprune.compress(wrapped, "fastv", keep=7) as trace:
            assert torch.equal(wrapped(**inputs).logits, want)
            assert torch.equal(model(**inputs).logits, want)
            assert tokprune.trace_of(model) is trace is tokprune.trace_of(wrapped)
            assert trace.prefills == 2
            with pytest.raises(tokprune.AlreadyPatchedError):
                tokprune.patch(model, "random", keep=3)
        assert fingerprint(model) == before
        first = tokprune.patch(model, "random", keep=3)
        assert tokprune.trace_of(wrapped) is first
        second = tokprune.patch(wrapped, "fastv", keep=7)
        assert tokprune.trace_of(model) is second
        assert tokprune.is_patched(wrapped)
        tokprune.unpatch(wrapped)
        assert not tokprune.is_patched(model)
        assert tokprune.trace_of(wrapped) is None
        assert torch.equal(wrapped(**inputs).logits, plain)
    assert bind(wrapped).model is model
    if not isinstance(wrapped, Pipeline):
        found = tokprune.calibrate(wrapped, "fastv", [inputs], target=5, count="last")
        assert found == tokprune.calibrate(model, "fastv", [inputs], target=5, count="last")
        assert not tokprune.is_patched(wrapped)


def test_compiled_models_are_looked_through() -> None:
    model = tiny.llava(layers=2, vision_layers=2)
    compiled = torch.compile(model, backend="eager")
    trace = tokprune.patch(compiled, "random", keep=3)
    assert tokprune.trace_of(model) is trace is tokprune.trace_of(nn.DataParallel(compiled))
    model.compile(backend="eager")  # in place
    assert tokprune.is_patched(model)
    tokprune.unpatch(model)
    assert not tokprune.is_patched(compiled)


def test_token_types_are_added_for_wrapped_models() -> None:
    model = tiny_family("gemma3").build()
    inputs = dict(tiny_family("gemma3").inputs(model, PROMPTS))
    types = inputs.pop("token_type_ids")
    assert torch.equal(add_token_types(nn.DataParallel(model), inputs)["token_type_ids"], types)


# ------------------------------------------------------------------------------- what is no wrapper


def test_of_several_models_it_is_said_where_they_are() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = tiny.llava(layers=2, vision_layers=2)
            self.reference = nn.DataParallel(tiny.llava_next(layers=2, vision_layers=2))

    both = Both()
    words = (
        r"holds 2 models; pass one of them: its (model\.)?policy \(LlavaForConditionalGeneration\) "
        r"or its (model\.)?reference\.module \(LlavaNextForConditionalGeneration\)"
    )
    for call in (
        lambda: tokprune.patch(both, "random", keep=3), lambda: tokprune.unpatch(both),
        lambda: tokprune.is_patched(both), lambda: tokprune.trace_of(Pipeline(both)),
        lambda: tokprune.compress(both, "random", keep=3).__enter__(),
    ):  # fmt: skip
        with pytest.raises(UnsupportedModelError, match=words):
            call()
    tokprune.patch(both.policy, "random", keep=3)
    both.reference = both.policy  # the same, twice
    assert tokprune.is_patched(both)


@pytest.mark.parametrize("model", [None, "llava", 3, SimpleNamespace(model="llava")])
def test_no_model_at_all(model: Any) -> None:
    for call in (
        lambda: tokprune.patch(model, "random", keep=3), lambda: tokprune.unpatch(model),
        lambda: tokprune.is_patched(model), lambda: tokprune.trace_of(model),
    ):  # fmt: skip
        with pytest.raises(UnsupportedModelError, match="should be a model"):
            call()


def test_modules_without_a_supported_model() -> None:
    for model in (nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)), tiny.llava().model):
        assert not tokprune.is_patched(model)
        assert tokprune.trace_of(model) is None
        tokprune.unpatch(model)
        with pytest.raises(UnsupportedModelError, match=type(model).__name__):
            tokprune.patch(model, "random", keep=3)


def test_a_model_of_transformers_around_another_is_no_wrapper() -> None:
    """Retrieval models call the decoder of the one inside themselves."""
    retrieval = type("Retrieval", (ValueHead,), {"__module__": "transformers.models.x.modeling_x"})
    with pytest.raises(UnsupportedModelError, match="model Retrieval is not supported"):
        tokprune.patch(retrieval(tiny.llava()), "random", keep=3)


def test_a_refused_model_in_a_wrapper_is_named() -> None:
    class Blip2ForConditionalGeneration(nn.Linear):
        pass

    with pytest.raises(UnsupportedModelError, match="Blip2ForConditionalGeneration is not"):
        tokprune.patch(nn.DataParallel(Blip2ForConditionalGeneration(2, 2)), "random", keep=3)


# ------------------------------------------------------------------------------- adapters of peft


@functools.cache
def _adapter(kind: str) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    lora = functools.partial(peft.LoraConfig, target_modules=linear, init_lora_weights=False)
    return {
        "lora": lora,
        "lora, causal": functools.partial(lora, task_type="CAUSAL_LM"),
        "lora, projector saved": functools.partial(lora, modules_to_save=["multi_modal_projector"]),
        "ia3": functools.partial(
            peft.IA3Config, target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
        "prefix": functools.partial(
            peft.PrefixTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=3
        ),
        "prompt": functools.partial(
            peft.PromptTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=3
        ),
    }[kind]()  # fmt: skip


def _adapted(model: Any, kind: str) -> Any:
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(model, _adapter(kind)).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "lora") for family in FAMILIES]
    + [("llava-1.5", kind) for kind in ("lora, causal", "lora, projector saved", "ia3")],
)
def test_an_adapted_model_equals_the_merged_one(family: str, kind: str, method: str) -> None:
    _adapter(kind)
    model = tiny_family(family).build()
    inputs = tiny_family(family).inputs(model, PROMPTS)
    adapted = _adapted(model, kind)
    options = METHODS[method]
    with torch.no_grad():
        plain = adapted(**inputs).logits
        with tokprune.compress(adapted, method, **options) as trace:
            got = adapted(**inputs).logits
            assert tokprune.trace_of(adapted.get_base_model()) is trace
            assert "Peft" not in trace.summary()
        assert torch.equal(adapted(**inputs).logits, plain)
        assert got.shape[1] < plain.shape[1]
        merged = adapted.merge_and_unload()
        with tokprune.compress(merged, method, **options):
            assert_same_logits(got, merged(**inputs).logits, tolerance=1e-4)


def test_nested_wrappers_and_the_adapter_switched_off() -> None:
    _adapter("lora")
    model = tiny.llava()
    inputs = tiny_family("llava-1.5").inputs(model, PROMPTS)
    with torch.no_grad(), tokprune.compress(model, "fastv", keep=7):
        want = model(**inputs).logits
    adapted = _adapted(model, "lora")
    with torch.no_grad(), tokprune.compress(Pipeline(nn.DataParallel(adapted)), "fastv", keep=7):
        with adapted.disable_adapter():
            assert torch.equal(adapted(**inputs).logits, want)
        assert not torch.equal(adapted(**inputs).logits, want)


def test_an_adapter_put_on_a_patched_model() -> None:
    _adapter("lora")
    inputs = tiny_family("llava-1.5").inputs(tiny.llava(), PROMPTS)
    for method, options in METHODS.items():
        model = tiny.llava()
        tokprune.patch(model, method, **options)
        adapted = _adapted(model, "lora")
        with torch.no_grad():
            got = adapted(**inputs).logits
            tokprune.patch(adapted, method, **options)
            assert torch.equal(adapted(**inputs).logits, got)


@pytest.mark.parametrize("method", METHODS)
def test_a_projector_replaced_under_a_patch_is_noticed(method: str) -> None:
    """``modules_to_save`` puts a copy of the projector in its place, which the patch is not on."""
    _adapter("lora, projector saved")
    model = tiny.llava()
    inputs = tiny_family("llava-1.5").inputs(model, PROMPTS)
    tokprune.patch(model, method, **METHODS[method])
    adapted = _adapted(model, "lora, projector saved")
    with torch.no_grad():
        with pytest.raises(UnsupportedModelError, match=r"projector.*patch the model again"):
            adapted(**inputs)
        tokprune.patch(adapted, method, **METHODS[method])
        assert adapted(**inputs).logits.shape[1] < inputs["input_ids"].shape[1]


def test_prefixes_stand_in_the_cache() -> None:
    """Where all tokens are kept, a model with a prefix is as it is unpatched."""
    _adapter("prefix")
    adapted = _adapted(tiny.llava(), "prefix")
    inputs = tiny_family("llava-1.5").inputs(unwrap(adapted), PROMPTS)
    with torch.no_grad():
        want = adapted(**inputs).logits
        with tokprune.compress(adapted, "random", keep=36):
            assert_same_logits(adapted(**inputs).logits, want)
        with tokprune.compress(adapted, "fastv", keep=7) as trace:
            assert adapted(**inputs).logits.shape[1] < want.shape[1]
    assert trace.last is not None
    assert trace.last.past == 3


def test_virtual_tokens_before_the_embedded_prompt_are_refused_by_name() -> None:
    _adapter("prompt")
    adapted = _adapted(tiny.llava(), "prompt")
    for wrapped in (adapted, nn.DataParallel(adapted)):
        with pytest.raises(UnsupportedModelError, match=r"PROMPT_TUNING.*virtual tokens"):
            tokprune.patch(wrapped, "random", keep=5)
    assert not tokprune.is_patched(adapted)


# ------------------------------------------------------------------------------- accelerate


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("first", [True, False])
def test_models_prepared_by_accelerate(precision: str, first: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    states = importlib.import_module("accelerate.state")
    model, other = tiny.llava(), tiny.llava()
    inputs = tiny_family("llava-1.5").inputs(model, PROMPTS)
    states.AcceleratorState._reset_state(True)
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        if first:
            tokprune.patch(model, "fastv", keep=7)
        prepared = accelerator.prepare(model)
        tokprune.patch(prepared, "fastv", keep=7)
        tokprune.patch(other, "fastv", keep=7)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            want = other(**inputs).logits.float()
        with torch.no_grad():
            assert torch.equal(prepared(**inputs).logits, want)
        assert tokprune.is_patched(accelerator.unwrap_model(prepared))
        tokprune.unpatch(prepared)
        assert not tokprune.is_patched(model)
    finally:
        states.AcceleratorState._reset_state(True)


# ------------------------------------------------------------------------------- several processes


def _sharded(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


DISTRIBUTED = {"ddp": DistributedDataParallel, "fsdp2": _sharded}


def _worker(rank: int, world: int, folder: str) -> None:
    """Every process compresses prompts of its own, forward and backward, patched before it is
    wrapped and after."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        for family in ("llava-1.5", "qwen2.5-vl"):
            tiny_ = tiny_family(family)
            inputs = tiny_.inputs(tiny_.build(), PROMPTS[:1], seed=rank)
            for method in ("visionzip", "transprune"):
                alone = tiny_.build()
                with torch.no_grad(), tokprune.compress(alone, method, **METHODS[method]):
                    want = alone(**inputs).logits
                for wrap in DISTRIBUTED.values():
                    for first in (True, False):
                        _compresses(tiny_.build(), wrap, first, method, inputs, want)
    finally:
        dist.destroy_process_group()


def _compresses(
    model: Any, wrap: Any, first: bool, method: str, inputs: dict[str, Tensor], want: Tensor
) -> None:
    if first:
        tokprune.patch(model, method, **METHODS[method])
    wrapped = wrap(model)
    if not first:
        tokprune.patch(wrapped, method, **METHODS[method])
    assert tokprune.is_patched(model)
    assert tokprune.is_patched(wrapped)
    logits = wrapped(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-4)
    logits.sum().backward()
    assert any(p.grad is not None for p in model.model.language_model.parameters())
    tokprune.unpatch(wrapped)
    assert not tokprune.is_patched(model)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("world", [1, 2])
def test_ddp_and_fsdp2(world: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (world, str(tmp_path)), nprocs=world)
