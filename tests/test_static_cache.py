"""Static caches: what is decoded is what a cache that grows gives, from a buffer that is shorter by
what was dropped."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from family_cases import FAMILIES, FLASH, METHODS, SHAPES, case_of, model_of
from flash_double import flash_double
from torch import Tensor
from transformers import CompileConfig, DynamicCache, QuantizedCache, StaticCache

import tokprune
from tokprune.engine.cache import cache_argument
from tokprune.engine.static_cache import CompressedStaticLayer
from tokprune.errors import UnsupportedModelError
from tokprune.families import bind
from tokprune.methods import make_method
from tokprune.testing import Case, assert_same_logits, continuation_tokens, tiny_family
from tokprune.testing.generated import forced_logits
from tokprune.testing.grid_prompts import TYPED
from tokprune.testing.tiny import llava

STATIC: dict[str, Any] = {"cache_implementation": "static"}
#: transformers' own static cache cannot do these, no patch at work
BROKEN = {"paligemma2"} if TYPED else set()
#: its mixture of experts asks how many tokens each has, which no graph can
GRAPHLESS = set() if TYPED else {"glm4v-moe"}


def both(case: Case, **options: Any) -> tuple[Any, Any]:
    """Checks the logits on a static cache; returns the traces on either cache."""
    inputs, tokens = case.inputs(), continuation_tokens(len(case.prompts), 3)
    traces = []
    try:
        with case.compress() as trace:
            want = forced_logits(case.model, inputs, tokens)
    except (UnsupportedModelError, ValueError) as refusal:
        pytest.skip(str(refusal))
    traces.append(trace.last)
    with case.compress() as trace:
        got = forced_logits(case.model, inputs, tokens, **STATIC, **options)
    traces.append(trace.last)
    assert_same_logits(got, want, tolerance=case.family.tolerance)
    return traces[0], traces[1]


@pytest.mark.parametrize(
    "family",
    ["llava-1.5", *(pytest.param(f, marks=pytest.mark.full) for f in ("qwen2.5-vl", "gemma3"))],
)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "evs"])
def test_equals_a_cache_that_grows(method: str, family: str) -> None:
    plain, static = both(case_of(method, family, SHAPES["ragged"]))
    assert [layer.counts for layer in static.layers] == [layer.counts for layer in plain.layers]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in BROKEN])
@pytest.mark.parametrize("method", ["random-compact", "fastv", "mustdrop"])
def test_families(method: str, family: str) -> None:
    both(case_of(method, family, SHAPES["ragged"]))


@pytest.mark.parametrize("method", ["divprune", "fastv-compact", "mustdrop"])
def test_flash(method: str) -> None:
    with flash_double():
        both(case_of(method, "llava-1.5", SHAPES["ragged"], model_of("llava-1.5", FLASH)))
    model_of.cache_clear()


@pytest.mark.parametrize("family", ["llava-1.5", "gemma3"])
def test_the_buffer_is_shorter(family: str) -> None:
    case = case_of("fastv", family, SHAPES["single"])
    inputs = case.inputs()
    length = inputs["input_ids"].shape[1]
    cache = StaticCache(config=case.model.config.get_text_config(), max_cache_len=length + 9)
    with case.compress() as trace:
        forced_logits(
            case.model, inputs, continuation_tokens(1, 2), **{cache_argument(case.model): cache}
        )
    sizes = [layer.keys.shape[2] for layer in cache.layers]
    kept = [layer.lengths[0] for layer in trace.last.layers]
    windows = [block.window for block in bind(case.model).parts.decoder_layers]
    # of a sliding window, what the next token sees beside itself
    held = [n if w is None else min(n, w - 1) for n, w in zip(kept, windows)]
    assert sizes == [n + 9 for n in held]
    assert min(sizes) < length + 9
    assert all(int(layer.get_seq_length()) == length + 2 for layer in cache.layers)


@torch.no_grad()
def forward(case: Case, inputs: dict[str, Tensor], cache: Any, past: int) -> Tensor:
    """Logits of the last token of a turn on a cache."""
    tokens = inputs["input_ids"].shape[1]
    mask = torch.ones(len(inputs["input_ids"]), past + tokens, dtype=torch.long)
    place: dict[str, Any] = {}
    if not TYPED:  # transformers 4 reads it from the values of a static cache otherwise
        place["cache_position"] = torch.arange(past, past + tokens)
    call = {**inputs, "attention_mask": mask, **place, cache_argument(case.model): cache}
    return case.model(**call).logits[:, -1]


def conversation(case: Case, cache: Any) -> Tensor:
    """Text, an image, a step, text, another image, two steps: the logits after each."""
    inputs, given = case.having(prompts=[[2, "image", 4]]).inputs(), []
    inputs.pop("attention_mask")
    text = {"input_ids": continuation_tokens(1, 5)}
    one = {"input_ids": continuation_tokens(1, 1)}
    past = 0
    for turn in (text, inputs, one, text, inputs, one, one):
        given.append(forward(case, turn, cache, past))
        past += turn["input_ids"].shape[1]
    return torch.stack(given, 1)


@pytest.mark.parametrize("method", ["random", "random-compact", "fastv", "sparsevlm", "mustdrop"])
def test_turns_with_and_without_images(method: str) -> None:
    case = case_of(method, "llava-1.5", SHAPES["single"])
    config = case.model.config.get_text_config()
    with case.compress():
        want = conversation(case, DynamicCache(config=config))
        got = conversation(case, StaticCache(config=config, max_cache_len=150))
    assert_same_logits(got, want)


def test_copies_and_removed_tokens() -> None:
    case = case_of("fastv", "llava-1.5", SHAPES["single"])
    config, inputs = case.model.config.get_text_config(), case.inputs()
    inputs.pop("attention_mask")
    length, one = inputs["input_ids"].shape[1], continuation_tokens(1, 1)
    with case.compress():
        growing = DynamicCache(config=config)
        forward(case, inputs, growing, 0)
        want = forward(case, {"input_ids": one}, growing, length)
        cache = StaticCache(config=config, max_cache_len=80)
        forward(case, inputs, cache, 0)
        copied = copy.deepcopy(cache)
        assert_same_logits(forward(case, {"input_ids": one}, cache, length), want)
        # its last two tokens are fed again, to two copies of the row
        for layer in copied.layers:
            layer.crop(-2)
            layer.reorder_cache(torch.tensor([0, 0]))
        again = {"input_ids": torch.cat([inputs["input_ids"][:, -2:], one], 1).expand(2, -1)}
        got = forward(case, again, copied, length - 2)
    assert_same_logits(got, want.expand(2, -1))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams(options: dict[str, Any]) -> None:
    case = case_of("fastv", "llava-1.5", SHAPES["ragged"])
    given = {**case.inputs(), "max_new_tokens": 5, "do_sample": False, **options}
    with case.compress():
        want, got = case.model.generate(**given), case.model.generate(**given, **STATIC)
    assert torch.equal(got, want)


def test_after_the_patch_a_cache_is_as_before() -> None:
    """transformers 4 keeps the static cache of a model from call to call."""
    case = case_of("fastv", "llava-1.5", SHAPES["ragged"])
    given = {**case.inputs(), "max_new_tokens": 4, "do_sample": False, **STATIC}
    want = case.model.generate(**given)
    with case.compress():
        first, second = case.model.generate(**given), case.model.generate(**given)
    assert torch.equal(first, second)
    assert torch.equal(case.model.generate(**given), want)
    cache = StaticCache(config=case.model.config.get_text_config(), max_cache_len=90)
    before = [(type(layer), sorted(layer.__dict__)) for layer in cache.layers]
    named = {cache_argument(case.model): cache}
    with case.compress():
        out = case.model(**case.inputs(), **named)
    assert all(type(layer) is CompressedStaticLayer for layer in cache.layers)
    step = {"input_ids": continuation_tokens(4, 1), "attention_mask": None}
    with pytest.raises(RuntimeError, match="compressed by tokprune, but the model that continues"):
        case.model(**step, **named)
    cache.reset()
    assert [type(layer) for layer in cache.layers] == [kind for kind, _ in before]
    plain = case.model(**case.inputs(), **named).logits
    assert not torch.allclose(plain[:, -1], out.logits[:, -1], atol=1e-3)
    assert_same_logits(plain, case.model(**case.inputs()).logits)


def test_refusals() -> None:
    case = case_of("fastv", "llava-1.5", SHAPES["single"])
    config, name = case.model.config.get_text_config(), cache_argument(case.model)
    length = case.inputs()["input_ids"].shape[1]
    with case.compress():
        short = StaticCache(config, max_cache_len=length - 1)
        with pytest.raises(ValueError, match=rf"len={length - 1}\) is too short.*{length},"):
            case.model(**case.inputs(), **{name: short})
        quantized = object.__new__(QuantizedCache)
        quantized.layers = []
        with pytest.raises(UnsupportedModelError, match=r"=QuantizedCache is not.*quantised keys"):
            case.model(**case.inputs(), **{name: quantized})
    model = llava(decoder="mistral", sliding_window=16)
    windowed = case_of("fastv", "llava-1.5/mistral", SHAPES["single"], model)
    config = windowed.model.config.get_text_config()
    with windowed.compress(), pytest.raises(UnsupportedModelError, match="sliding windows does"):
        windowed.model(**windowed.inputs(), **{name: StaticCache(config, max_cache_len=200)})


def compiled(**options: Any) -> CompileConfig:
    config = CompileConfig(backend="eager", **options)
    config._compile_all_devices = True
    return config


def small_model() -> Any:
    """Two layers: tracing takes its time."""
    return tiny_family("llava-1.5").build(attention="sdpa", layers=2)


@pytest.fixture
def graphs() -> Iterator[Any]:
    """What torch.compile counts, from zero on."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch.compiler.reset()


#: positions move in all layers alike, or in each by another number, or not, or windows with them
TRACED = [
    ("mustdrop", "llava-1.5"), ("pyramiddrop", "qwen2.5-vl"), ("fastv-compact", "gemma3"),
]  # fmt: skip
REST = [
    *((m, "llava-1.5") for m in METHODS if m != "evs"),
    *(("fastv-compact", f) for f in FAMILIES if f not in BROKEN | GRAPHLESS),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "family"),
    [*TRACED, *(pytest.param(*pair, marks=pytest.mark.full) for pair in REST)],
)
def test_a_step_is_one_graph(method: str, family: str, graphs: Any) -> None:
    both(case_of(method, family, SHAPES["ragged"]), compile_config=compiled(fullgraph=True))
    assert graphs["stats"]["unique_graphs"] == 1


def test_no_recompiling_from_request_to_request(graphs: Any) -> None:
    case = case_of("divprune", "llava-1.5", SHAPES["single"], small_model())
    tokens = continuation_tokens(1, 6)
    options = {**STATIC, "compile_config": compiled(fullgraph=True)}
    with case.compress():
        for seed in range(4):
            inputs = case.inputs(seed)
            want = forced_logits(case.model, inputs, tokens)
            assert_same_logits(forced_logits(case.model, inputs, tokens, **options), want)
    assert graphs["stats"]["unique_graphs"] == 1
    assert not graphs["graph_break"]


def test_a_graph_is_good_for_one_patch(graphs: Any) -> None:
    """The same shapes, and every time another method: no step of an earlier one is taken."""
    case = case_of("random", "llava-1.5", SHAPES["single"], small_model())
    inputs, tokens = case.inputs(), continuation_tokens(1, 3)
    options = {**STATIC, "compile_config": compiled(fullgraph=True)}

    def check() -> Tensor:
        want = forced_logits(case.model, inputs, tokens)
        assert_same_logits(forced_logits(case.model, inputs, tokens, **options), want)
        return want

    seen = [check()]
    for changes in (
        {"positions": "preserve"}, {"positions": "compact"}, {"seed": 1}, {"positions": "compact"},
    ):  # fmt: skip
        with tokprune.compress(case.model, "random", keep=4, **changes):
            seen.append(check())
        seen.append(check())
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[2], seen[-1])
    assert not torch.allclose(seen[1][:, 1:], seen[3][:, 1:], atol=1e-3)
    assert torch.equal(seen[3], seen[7])


def test_python_and_compiled_steps_take_turns(graphs: Any) -> None:
    made = make_method("fastv", keep=4, prune_before=1, positions="compact")
    case = case_of(made, "llava-1.5", SHAPES["ragged"], small_model())
    inputs, cut = case.inputs(), -2
    config, name = case.model.config.get_text_config(), cache_argument(case.model)
    length, tokens = inputs["input_ids"].shape[1], continuation_tokens(4, 6)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    fast = torch.compile(case.model, backend="eager", fullgraph=True)
    with case.compress(), torch.no_grad():
        answers = []
        for kinds in ((case.model,) * 6, (fast, case.model, fast, fast, case.model, fast)):
            cache = StaticCache(config=config, max_cache_len=length + 9)
            case.model(**inputs, **{name: cache})
            for at, model in enumerate(kinds):
                step = {"input_ids": tokens[:, at : at + 1],
                        "attention_mask": mask[:, : length + at + 1], name: cache}  # fmt: skip
                if not TYPED:
                    step["cache_position"] = torch.tensor([length + at])
                answers.append(model(**step).logits)
            assert int(cache.layers[1].get_seq_length()) == length + 6
            for layer in cache.layers:
                layer.crop(cut)
                assert layer.seen == length + 6 + cut
    assert_same_logits(torch.cat(answers[6:], 1), torch.cat(answers[:6], 1))


def test_text_only_passes_by() -> None:
    case = case_of("fastv", "llava-1.5", [[9], [5]])
    given = {**case.inputs(), "max_new_tokens": 4, "do_sample": False, **STATIC}
    want = case.model.generate(**given)
    with case.compress():
        assert torch.equal(case.model.generate(**given), want)


def test_a_window_on_every_layer() -> None:
    """Where the cache is for fewer tokens than a window, it tells for how many."""
    case = case_of(
        "fastv", "llava-1.5/mistral", SHAPES["ragged"], llava(decoder="mistral", sliding_window=64)
    )
    both(case)
