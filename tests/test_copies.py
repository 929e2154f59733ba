"""Copies of patched models, of parts of them and of what they make; models that share parts."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import tokprune
from tokprune.engine.shared_encoder import SharedEncoder
from tokprune.errors import AlreadyPatchedError, UnsupportedModelError
from tokprune.families import bind
from tokprune.testing import tiny, tiny_family
from tokprune.testing.checks.leftovers import differences, fingerprint

PROMPTS = [[4, "image", 6], [7, "image", 9]]
FAMILIES = ["llava-1.5", "llava-next", "qwen2.5-vl", "qwen3-vl", "gemma3"]
METHODS: dict[str, dict[str, Any]] = {
    "fastv": {"keep": 7},
    "divprune": {"keep": 6},
    "visionzip": {"dominant": 5, "contextual": 2},
    "flowcut": {"keep": 14},
    "tome": {"r": 3},
    "transprune": {"keep": (8, 5), "prune_before": (2, 4), "transition_layers": (1, 3)},
}
CASES = [
    pytest.param(
        family, method, marks=[] if family in ("llava-1.5", "qwen2.5-vl") else pytest.mark.full
    )
    for family in FAMILIES
    for method in METHODS
    if "llava" in family or method not in ("flowcut", "tome")
]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def _inputs(family: str, model: Any) -> dict[str, torch.Tensor]:
    return tiny_family(family).inputs(model, PROMPTS)


def _left(model: Any, clean: Any) -> list[str]:
    """What a model has on it that an unpatched copy of it has not."""
    both = fingerprint(clean), fingerprint(model)
    for known in both:
        del known["configs"]  # ids, of two models
    return differences(*both)


# ------------------------------------------------------------------------------- deep copies


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_deep_copy_is_patched_and_independent(family: str, method: str) -> None:
    model = tiny_family(family).build()
    inputs = _inputs(family, model)
    plain = model(**inputs).logits
    clean, before = copy.deepcopy(model), fingerprint(model)
    trace = tokprune.patch(model, method, **METHODS[method])
    want, last = model(**inputs).logits, trace.last
    twin = copy.deepcopy(model)
    own = tokprune.trace_of(twin)
    assert own is not None
    assert own is not trace
    assert own.method == trace.method
    assert torch.equal(twin(**inputs).logits, want)
    assert trace.last is last
    assert own.last is not None
    for parameter in model.parameters():
        parameter.zero_()
    assert not torch.equal(model(**inputs).logits, want)
    assert torch.equal(twin(**inputs).logits, want)
    tokprune.unpatch(model)
    assert fingerprint(model) == before
    assert torch.equal(twin(**inputs).logits, want)
    tokprune.unpatch(twin)
    assert _left(twin, clean) == []
    assert torch.equal(twin(**inputs).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_of_a_copy(family: str) -> None:
    model = tiny_family(family).build()
    inputs = _inputs(family, model)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokprune.patch(model, "visionzip", **METHODS["visionzip"])
    want, twin = model.generate(**inputs, **options), copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "vision" in name or "visual" in name:
            parameter.zero_()
    assert torch.equal(twin.generate(**inputs, **options), want)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_copied_part_is_bare(family: str, method: str) -> None:
    """Towers, projectors, decoders, layers, and the model without its head."""
    model = tiny_family(family).build()
    inputs = _inputs(family, model)
    plain = model.model(**inputs)[0]
    clean = copy.deepcopy(model)
    tokprune.patch(model, method, **METHODS[method])
    for name, module in model.named_modules():
        if not name or not list(module.children()):
            continue
        twin, known = copy.deepcopy(module), clean.get_submodule(name)
        for own, other in zip(twin.modules(), known.modules()):
            assert sorted(own.__dict__) == sorted(other.__dict__), name
            assert list(own._forward_hooks) == list(other._forward_hooks), name
            assert list(own._forward_pre_hooks) == list(other._forward_pre_hooks), name
            if hasattr(own, "config"):
                assert own.config._attn_implementation == other.config._attn_implementation
    assert torch.equal(copy.deepcopy(model.model)(**inputs)[0], plain)


def test_a_copy_made_inside_compress_stays_patched() -> None:
    model = tiny.llava()
    inputs = _inputs("llava-1.5", model)
    with tokprune.compress(model, "fastv", keep=7):
        want, twin = model(**inputs).logits, copy.deepcopy(model)
        with tokprune.compress(twin, "random", keep=3):  # it is not inside a block itself
            assert twin(**inputs).logits.shape != want.shape
        assert torch.equal(twin(**inputs).logits, want)
    assert not tokprune.is_patched(model)
    assert torch.equal(twin(**inputs).logits, want)


def test_what_is_copied_together_stays_together() -> None:
    model = tiny.llava()
    tokprune.patch(model, "flowcut", keep=14)
    for first, second in ((model, model.model.vision_tower), (model.model.vision_tower, model)):
        one, two, again = copy.deepcopy([first, second, first])
        whole, tower = (one, two) if first is model else (two, one)
        assert whole.model.vision_tower is tower
        assert again is one


def test_a_copy_of_a_copy_and_other_wrappers_of_copies() -> None:
    model = tiny.llava()
    inputs = _inputs("llava-1.5", model)
    tokprune.patch(model, "flowcut", keep=14)
    want = model(**inputs).logits
    assert torch.equal(copy.deepcopy(copy.deepcopy(model))(**inputs).logits, want)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    assert tokprune.is_patched(averaged)
    assert torch.equal(averaged(**inputs).logits, want)
    tokprune.unpatch(averaged)
    assert tokprune.is_patched(model)
    assert averaged(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_copies_go_when_nobody_has_them() -> None:
    model = tiny.llava(layers=2, vision_layers=2)
    tokprune.patch(model, "random", keep=5)
    twin = copy.deepcopy(model)
    known = [weakref.ref(model), weakref.ref(twin)]
    del model, twin
    gc.collect()
    assert [own() for own in known] == [None, None]


def test_a_shallow_copy_shares_modules_patch_and_trace() -> None:
    model = tiny.llava()
    inputs = _inputs("llava-1.5", model)
    trace = tokprune.patch(model, "fastv", keep=7)
    shell, want = copy.copy(model), model(**inputs).logits
    assert tokprune.trace_of(shell) is trace
    assert torch.equal(shell(**inputs).logits, want)
    assert torch.equal(copy.copy(model.model)(**inputs)[0], model.model(**inputs)[0])
    assert torch.equal(copy.deepcopy(shell)(**inputs).logits, want)
    tokprune.unpatch(shell)
    assert not tokprune.is_patched(model)
    assert copy.deepcopy(shell)(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    copy.copy(shell).__reduce_ex__(4)[2].__reduce_ex__(4)  # nothing keeps it from being pickled


class _Same(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


def test_modules_whose_class_has_a_way_of_its_own_to_be_copied() -> None:
    """Parametrised modules (weight norm, …) do."""
    model = tiny.llava()
    inputs = _inputs("llava-1.5", model)
    plain = model(**inputs).logits
    tokprune.patch(model, "tome", r=3)
    norms = [layer.layer_norm2 for layer in bind(model).parts.tower.layers]
    for norm in norms:
        parametrize.register_parametrization(norm, "weight", _Same())
    assert any(norm._forward_pre_hooks for norm in norms)
    want, twin = model(**inputs).logits, copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, want)
    tokprune.unpatch(twin)
    assert not any(
        layer.layer_norm2._forward_pre_hooks for layer in bind(twin).parts.tower.layers
    )  # fmt: skip
    assert torch.equal(twin(**inputs).logits, plain)
    assert torch.equal(model(**inputs).logits, want)


def test_copies_while_other_threads_run_the_model() -> None:
    model = tiny.llava()
    inputs = _inputs("llava-1.5", model)
    tokprune.patch(model, "flowcut", keep=14)
    want, wrong, done = model(**inputs).logits, [], threading.Event()

    def run() -> None:
        with torch.no_grad():
            while not done.is_set():
                wrong.extend([1] * (not torch.equal(model(**inputs).logits, want)))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(5):
            assert torch.equal(copy.deepcopy(model)(**inputs).logits, want)
    finally:
        done.set()
        thread.join()
    assert wrong == []


def test_a_copy_does_not_share_the_encoder_of_a_model_whose_passes_are_remembered() -> None:
    model = tiny.llava()
    inputs = _inputs("llava-1.5", model)
    want, clean = model(**inputs).logits, copy.deepcopy(model)
    with SharedEncoder(bind(model)) as shared:
        shared.remember(inputs["pixel_values"])
        model(**inputs)
        with tokprune.compress(model, "fastv", keep=7):
            patched = copy.deepcopy(model)
        twin, ran = copy.deepcopy(model), (shared.ran, shared.spared)
        assert torch.equal(twin(**inputs).logits, want)
        patched(**inputs)
        assert (shared.ran, shared.spared) == ran
    assert _left(twin, clean) == []
    assert _left(model, clean) == []


# ------------------------------------------------------------------------------- pickles and files


def test_a_patched_model_is_not_pickled_and_says_what_to_do() -> None:
    model = tiny.llava(layers=2, vision_layers=2)
    tokprune.patch(model, "fastv", keep=5, prune_before=1)
    start = multiprocessing.get_context("spawn").Process(target=print, args=(model,)).start
    for save in (
        lambda: pickle.dumps(model), lambda: pickle.dumps(nn.Sequential(model), 2), start,
        lambda: torch.save(model, io.BytesIO()), lambda: pickle.dumps(model.model.language_model),
    ):  # fmt: skip
        with pytest.raises(
            AlreadyPatchedError, match=r"Call tokprune\.unpatch\(model\).*state_dict"
        ):
            save()
    torch.save(model.state_dict(), io.BytesIO())
    tokprune.unpatch(model)
    again = pickle.loads(pickle.dumps(model))
    inputs = _inputs("llava-1.5", model)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_weights_and_config_know_nothing_of_the_patch(family: str, tmp_path: Path) -> None:
    model = tiny_family(family).build()
    inputs = _inputs(family, model)
    plain, names = model(**inputs).logits, list(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    tokprune.patch(model, "visionzip", **METHODS["visionzip"])
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()
    assert list(model.state_dict()) == names
    loaded = type(model).from_pretrained(tmp_path / "after").eval()
    assert not tokprune.is_patched(loaded)
    assert torch.equal(loaded(**inputs).logits, plain)


def test_the_config_of_a_tapped_module_copies_and_prints_as_the_models_own() -> None:
    model = tiny.llava()
    attention = model.model.language_model.layers[1].self_attn
    config, words = attention.config, repr(attention.config)
    with tokprune.compress(model, "fastv", keep=7):
        tapped = attention.config
        assert tapped is not config
        copies = [copy.deepcopy(tapped), copy.copy(tapped), pickle.loads(pickle.dumps(tapped))]
        for own in copies:
            assert own._attn_implementation == "sdpa"
            assert own.to_dict() == config.to_dict()
        assert repr(tapped) == words
        assert tapped.to_json_string() == config.to_json_string()


def _first_features(output: Any) -> torch.Tensor:
    features = getattr(output, "pooler_output", output)
    while not isinstance(features, torch.Tensor):
        features = features[0]
    return features


@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_outputs_of_a_patched_model_are_saved_as_any_tensor(family: str) -> None:
    model = tiny_family(family).build()
    inputs = _inputs(family, model)
    given = {n: v for n, v in inputs.items() if n.startswith(("pixel_values", "image_"))}
    trace = tokprune.patch(model, "visionzip", **METHODS["visionzip"])
    output = model.get_image_features(**given)
    features = _first_features(output)
    assert torch.equal(_first_features(copy.deepcopy(output)), features)
    pickle.dumps(output)
    file = io.BytesIO()
    torch.save(features, file)
    file.seek(0)
    torch.load(file, weights_only=True)
    model(**inputs)
    pickle.loads(pickle.dumps(copy.deepcopy(trace)))


def test_features_that_were_saved_are_not_taken_for_those_of_the_patched_model() -> None:
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 takes no features in place of pixels")
    model = tiny.llava()
    inputs = _inputs("llava-1.5", model)
    tokprune.patch(model, "divprune", keep=6)
    want = model(**inputs).logits
    output = model.get_image_features(inputs["pixel_values"])
    text = {n: v for n, v in inputs.items() if n != "pixel_values"}
    assert torch.equal(model(**text, mm_encoder_outputs={"image": output}).logits, want)
    twin = copy.deepcopy(output)
    assert torch.equal(model(**text, mm_encoder_outputs={"image": twin}).logits, want)
    loaded = pickle.loads(pickle.dumps(output))
    with pytest.raises(ValueError, match="mm_encoder_outputs was computed before"):
        model(**text, mm_encoder_outputs={"image": loaded})


@pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.to("cpu"), nn.Module.train])
def test_a_patched_model_may_be_cast_moved_and_trained(change: Any) -> None:
    model, other = tiny.llava(), tiny.llava()
    inputs = _inputs("llava-1.5", model)
    tokprune.patch(model, "flowcut", keep=14)
    model(**inputs)
    for own in (model, other):
        change(own)
    tokprune.patch(other, "flowcut", keep=14)
    for own in (inputs, {**inputs, "pixel_values": inputs["pixel_values"].double()}):
        if own["pixel_values"].dtype == model.dtype:
            assert torch.equal(model(**own).logits, other(**own).logits)


# ------------------------------------------------------------------------------- shared parts


SHARED = ["fastv", "divprune", "visionzip", "flowcut", "tome"]


@pytest.mark.parametrize("second", SHARED)
@pytest.mark.parametrize("first", SHARED)
def test_models_may_share_a_tower_and_a_projector(first: str, second: str) -> None:
    """Each is as it is alone, whether the other is patched or not, in whatever order."""
    one, two = tiny.llava(seed=0), tiny.llava(seed=1)
    two.model.vision_tower = one.model.vision_tower
    two.model.multi_modal_projector = one.model.multi_modal_projector
    inputs = _inputs("llava-1.5", one)
    plain = one(**inputs).logits, two(**inputs).logits
    before = fingerprint(one), fingerprint(two)
    with tokprune.compress(one, first, **METHODS[first]):
        want_one = one(**inputs).logits
    with tokprune.compress(two, second, **METHODS[second]):
        want_two = two(**inputs).logits
    trace = tokprune.patch(one, first, **METHODS[first])
    assert torch.equal(two(**inputs).logits, plain[1])
    assert trace.last is None
    tokprune.patch(two, second, **METHODS[second])
    for _ in range(2):
        assert torch.equal(two(**inputs).logits, want_two)
        assert torch.equal(one(**inputs).logits, want_one)
    three, four = copy.deepcopy((one, two))
    assert three.model.vision_tower is four.model.vision_tower
    assert torch.equal(three(**inputs).logits, want_one)
    assert torch.equal(four(**inputs).logits, want_two)
    tokprune.unpatch(one)
    assert torch.equal(one(**inputs).logits, plain[0])
    assert torch.equal(two(**inputs).logits, want_two)
    tokprune.unpatch(two)
    assert (fingerprint(one), fingerprint(two)) == before
    assert torch.equal(two(**inputs).logits, plain[1])


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen2-vl", "gemma3"])
def test_encoders_of_other_families_may_be_shared(family: str) -> None:
    one, two = tiny_family(family).build(), tiny_family(family).build()
    name = "visual" if hasattr(one.model, "visual") else "vision_tower"
    setattr(two.model, name, getattr(one.model, name))
    two.model.language_model.layers[0].mlp.down_proj.weight.mul_(1.5)
    inputs = _inputs(family, one)
    with tokprune.compress(one, "visionzip", **METHODS["visionzip"]):
        want = one(**inputs).logits
        with tokprune.compress(two, "visionzip", dominant=3, contextual=1):
            other = two(**inputs).logits
            assert torch.equal(one(**inputs).logits, want)
        assert other.shape[1] < want.shape[1] < two(**inputs).logits.shape[1]
        assert torch.equal(one(**inputs).logits, want)


def test_models_that_share_a_tower_in_threads() -> None:
    one, two = tiny.llava(seed=0), tiny.llava(seed=1)
    two.model.vision_tower = one.model.vision_tower
    inputs = _inputs("llava-1.5", one)
    tokprune.patch(one, "flowcut", keep=14)
    tokprune.patch(two, "visionzip", dominant=5, contextual=2)
    want, wrong = [one(**inputs).logits, two(**inputs).logits], []

    def run(number: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                got = (one, two)[number](**inputs).logits
                wrong.extend([number] * (not torch.equal(got, want[number])))

    threads = [threading.Thread(target=run, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_of_models_that_share_a_decoder_one_can_be_patched() -> None:
    one, two = tiny.llava(seed=0), tiny.llava(seed=1)
    two.model.language_model = one.model.language_model
    inputs = _inputs("llava-1.5", one)
    plain, before = two(**inputs).logits, fingerprint(two)
    tokprune.patch(one, "fastv", keep=7)
    assert torch.equal(two(**inputs).logits, plain)
    words = r"language model \(LlamaModel\).*LlavaForConditionalGeneration.*FastV.*unpatch"
    with pytest.raises(AlreadyPatchedError, match=words):
        tokprune.patch(two, "divprune", keep=6)
    with pytest.raises(AlreadyPatchedError, match=words), tokprune.compress(two, "random", keep=6):
        pass
    assert not tokprune.is_patched(two)
    assert tokprune.is_patched(one)
    tokprune.unpatch(one)
    assert fingerprint(two) == before
    with tokprune.compress(two, "divprune", keep=6):
        assert two(**inputs).logits.shape != plain.shape


def test_a_decoder_called_by_itself_leaves_nothing_for_the_next_call() -> None:
    model = tiny.llava()
    inputs = _inputs("llava-1.5", model)
    decoder = model.model.language_model
    step = decoder.embed_tokens(torch.tensor([[5], [6]]))
    text = {"inputs_embeds": step.repeat(1, 4, 1)}
    want = decoder(**text)[0]
    with tokprune.compress(model, "fastv", keep=7):
        cache = model(**inputs).past_key_values
        decoder(inputs_embeds=step, past_key_values=cache)
        assert torch.equal(decoder(**text)[0], want)


# ------------------------------------------------------------------------------- replicas


def _replica(model: Any) -> Any:
    """What ``torch.nn.parallel.replicate`` makes of a model for another device."""
    twins = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else twins[child]
        for name, parameter in module._parameters.items():
            twin._parameters.pop(name, None)
            twin.__dict__[name] = None if parameter is None else parameter.detach()
    return twins[model]


@pytest.mark.parametrize("family", FAMILIES)
def test_replicas_of_data_parallel_are_refused_by_name(family: str) -> None:
    model = tiny_family(family).build()
    inputs = _inputs(family, model)
    tokprune.patch(model, "visionzip", **METHODS["visionzip"])
    replica = _replica(model)
    with pytest.raises(UnsupportedModelError, match=r"DataParallel.*DistributedDataParallel"):
        replica(**inputs)
    with pytest.raises(UnsupportedModelError, match="DataParallel"):
        replica.model.language_model(inputs_embeds=torch.zeros(1, 3, 32))
    assert torch.equal(nn.DataParallel(model)(**inputs).logits, model(**inputs).logits)
