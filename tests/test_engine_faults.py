"""Faults found by attack on the engine, each as the right value: kinds of them, not the examples.

S2 a backend that changes under a patch; S4 a first turn of text before an image, padded, under a
sliding window; S5 decisions row by row; S6 scores are the layer's own; S7 a row never runs dry; S8
logits of padded batches have one alignment.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from family_cases import FLASH, SHAPES, case_of, double_installed
from torch import Tensor
from toy_methods import DropInDecoder

import tokprune
from tokprune.engine.cache import CompressedLayer, cache_argument
from tokprune.errors import UnsupportedModelError
from tokprune.families import bind
from tokprune.methods import make_method
from tokprune.testing import (
    Case,
    assert_same_logits,
    continuation_tokens,
    tiny,
    tiny_families,
    tiny_family,
)
from tokprune.testing.case import Prompts, dropped, last_of
from tokprune.testing.checks.decisions import batch_equals_singles
from tokprune.testing.checks.leftovers import differences, fingerprint
from tokprune.testing.checks.numbers import equals_oracle
from tokprune.testing.generated import forced_logits
from tokprune.testing.grid_prompts import TYPED
from tokprune.testing.numbering import prompt_positions
from tokprune.testing.tiny_gemma import gemma3
from tokprune.testing.tiny_others import llava_with
from tokprune.testing.tiny_tiles import cohere2_vision


@pytest.fixture(scope="module", autouse=True)
def flash() -> Iterator[None]:
    yield from double_installed()
    _model.cache_clear()


# ------------------------------------------------------------------------------- S2


METHODS = {
    "fastv": {"keep": 5},
    "pyramiddrop": {"keep": 4, "prune_before": (1, 3)},
    "flowcut": {"keep": 14},
    "visionzip": {"dominant": 5, "contextual": 2},
    "divprune": {"keep": 6},
    "random": {"keep": 6, "positions": "compact"},
    "sparsevlm": {"keep": 5, "prune_before": (2, 4), "recycle": 0},
    "transprune": {"keep": (8, 5), "prune_before": (2, 4), "transition_layers": (1, 3)},
    "cdpruner": {"keep": 6, "relevance": "text"},
}
SWITCHES = [("sdpa", "eager"), ("eager", "sdpa"), ("sdpa", FLASH), (FLASH, "eager")]


FAMILIES = ["llava-1.5", "llava-next", "qwen2.5-vl", "qwen3-vl", "gemma3"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_s2_a_patched_model_follows_its_backend(family: str, method: str) -> None:
    number = 2 * FAMILIES.index(family) + list(METHODS).index(method)
    _follows(family, method, SWITCHES[number % (2 if family == "gemma3" else 4)])


@pytest.mark.full
@pytest.mark.parametrize("switch", SWITCHES, ids="-".join)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_s2_every_switch(family: str, method: str, switch: tuple[str, str]) -> None:
    _follows(family, method, switch)


@functools.cache
def _model(family: str, backend: str) -> Any:
    return tiny_family(family).build(attention=backend)


def _follows(family: str, method: str, switch: tuple[str, str]) -> None:
    """After ``set_attn_implementation`` a patched model is as one patched under that backend:
    prefill and steps of a padded batch, twice, and again after switching back."""
    first, second = switch
    if FLASH in switch and family == "gemma3":
        pytest.skip("Gemma 3 has no flash attention")
    tiny_ = tiny_family(family)
    model = tiny_.build(attention=first)
    try:
        made = make_method(method, **METHODS[method])
        case = Case(made, tiny_, model, SHAPES["ragged"])
        with case.compress():
            pass
    except UnsupportedModelError:
        pytest.skip("works in the vision tower, which is refused on this family")
    inputs, tokens = case.inputs(), continuation_tokens(4, 3)
    want = {}
    for backend in switch:
        other = _model(family, backend)
        with tokprune.compress(other, made) as trace:
            want[backend] = forced_logits(other, inputs, tokens), columns(last_of(trace))
    with tokprune.compress(model, made) as trace:
        for backend in (first, second, first, second):
            model.set_attn_implementation(backend)
            got = forced_logits(model, inputs, tokens)
            assert torch.equal(got, want[backend][0])
            assert columns(last_of(trace)) == want[backend][1]
    plain = forced_logits(_model(family, second), inputs, tokens)
    assert torch.equal(forced_logits(model, inputs, tokens), plain)


def test_s2_unpatching_keeps_the_new_backend() -> None:
    model = tiny.llava()
    inputs = tiny_family("llava-1.5").inputs(model, SHAPES["single"])
    other = tiny.llava(attention="eager")
    with torch.no_grad():
        model(**inputs)
        other(**inputs)
    before = fingerprint(other)
    tokprune.patch(model, "fastv", keep=5)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(**inputs)
    tokprune.unpatch(model)
    after = fingerprint(model)
    for known in (before, after):
        del known["configs"]  # ids
        known["hooks"] = {  # numbered as they were installed, transformers' own too
            name: [len(own) for own in kinds] for name, kinds in known["hooks"].items()
        }
    assert differences(before, after) == []


def columns(prefill: Any) -> list[Any]:
    return [layer.column.tolist() for layer in prefill.layers]


# ------------------------------------------------------------------------------- S4


WINDOWED = {
    "mistral": (lambda a: llava_with("mistral", attention=a, window=8), "llava-1.5/mistral"),
    "phi3": (lambda a: llava_with("phi3", attention=a, window=8), "llava-1.5/phi3"),
    "gemma3": (lambda a: gemma3(attention=a, window=6), "gemma3"),
    "gemma3-wide": (lambda a: gemma3(attention=a, window=24), "gemma3"),
    "cohere2": (lambda a: cohere2_vision(attention=a, window=6), "cohere2-vision"),
    "llama": (lambda a: tiny.llava(attention=a), "llava-1.5"),
}


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "method",
    [
        ("fastv", {"keep": 4}),
        ("fastv", {"keep": 4, "positions": "compact"}),
        ("divprune", {"keep": 4, "positions": "preserve"}),
        ("divprune", {"keep": 4, "positions": "compact"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("decoder", WINDOWED)
def test_s4_text_first_then_an_image_in_a_padded_batch(
    decoder: str, method: tuple[str, dict[str, Any]], backend: str
) -> None:
    """A first turn of text alone, left-padded, then a turn with an image, then steps: every row is
    what it is alone, in two turns and, where the unpatched model makes no difference between these,
    in a single prompt, which equals the oracle. (Gemma 3 sees an image of a later turn causally: it
    takes token types in the first forward alone.)"""
    build, family = WINDOWED[decoder]
    tiny_, model = tiny_family(family), build(backend)
    made = make_method(method[0], **method[1])
    lengths, turn, steps = (14, 5, 9), [3, "image", 4], 4
    tokens = continuation_tokens(1, steps).expand(len(lengths), -1)
    texts = tiny_.inputs(model, [[n] for n in lengths], seed=3)
    sizes = [(24, 24)] * len(lengths)
    more = tiny_.inputs(model, [turn] * len(lengths), sizes, seed=4)
    with tokprune.compress(model, made):
        together = two_turns(model, texts, more, tokens)
    for row, n in enumerate(lengths):
        text = tiny_.row(texts, row, slice(0, 0))
        image = tiny_.row(more, row, slice(row, row + 1))
        own = tokens[row : row + 1]
        with tokprune.compress(model, made):
            alone = two_turns(model, text, image, own)
        assert_same_logits(together[row : row + 1], alone, f"row {row} against itself alone:")
        if decoder.startswith("gemma3"):
            continue
        whole = {
            name: torch.cat([text[name], image[name]], dim=1) if name in text else image[name]
            for name in image
        }
        case = _Fixed(made, tiny_, model, [[n, *turn]], whole)
        found = equals_oracle(case, steps=steps)
        if found.got.shape == alone.shape:
            assert_same_logits(alone, found.got, f"row {row}, two turns against one prompt:")


class _Fixed(Case):
    """A case with inputs of its own."""

    def __init__(
        self, method: Any, family: Any, model: Any, prompts: Prompts, inputs: dict[str, Tensor]
    ) -> None:
        super().__init__(method, family, model, prompts)
        object.__setattr__(self, "own", inputs)

    def inputs(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return dict(self.own)  # type: ignore[attr-defined]


@torch.no_grad()
def two_turns(
    model: Any, texts: dict[str, Tensor], more: dict[str, Tensor], tokens: Tensor
) -> Tensor:
    """Logits [B, 1 + steps, V] at the end of the second turn and at ``tokens`` after it."""
    mask = texts["attention_mask"]
    out = model(**texts, **prompt_positions(model, texts), use_cache=True)
    rows, feeds = [], [dict(more), *({"input_ids": t[:, None]} for t in tokens.unbind(1))]
    for feed in feeds:
        ids = feed["input_ids"]
        feed.pop("token_type_ids", None)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {**feed, "attention_mask": mask, "position_ids": position}
        out = model(**given, **{cache_argument(model): out.past_key_values}, use_cache=True)
        rows.append(out.logits[:, -1])
    return torch.stack(rows, dim=1)


# ------------------------------------------------------------------------------- S5


POSITIONS = [("preserve", "compact"), ("compact", "preserve"), ("compact", "compact")]


@pytest.mark.parametrize("positions", POSITIONS, ids="-".join)
@pytest.mark.parametrize("family", ["llava-1.5", "llava-next", "qwen2.5-vl", "qwen3-vl", "gemma3"])
def test_s5_rows_are_renumbered_each_on_their_own(family: str, positions: tuple[str, str]) -> None:
    """An input stage and a decoder stage that treat positions differently, in batches of which some
    rows have nothing to drop at either."""
    first, second = positions
    prompts: Prompts = [[4, "image", 6], [9], [3, "image", 5], [5, "image", 2, "image", 4]]
    model = tiny_family(family).build(attention="sdpa")
    sizes = [(24, 40), (16, 16), (40, 24), (16, 16)]  # by far not as many tokens, where sizes count
    for keep in ((8, 4), (8, 8), (1.0, 4), (8, 1.0)):
        method = tokprune.compose(
            make_method("random", keep=keep[0], positions=first),
            make_method("fastv", keep=keep[1], prune_before=2, positions=second),
        )
        case = Case(method, tiny_family(family), model, prompts, sizes)
        equals_oracle(case)
        inputs = case.inputs()
        _, together = case.prefill(inputs)
        for row, prompt in enumerate(prompts):
            if "image" not in prompt:
                continue
            _, alone = case.prefill(case.row(inputs, row))
            for layer, own in zip(together.layers, alone.layers):
                got, want = _positions_of(layer, row), _positions_of(own, 0)
                assert torch.equal(got - got[..., :1], want - want[..., :1])


def _positions_of(layer: Any, row: int) -> Tensor:
    position: Tensor = layer.position[..., row, :][..., layer.column[row] >= 0]
    return position


# ------------------------------------------------------------------------------- S6


DECODERS = ["cohere", "stablelm", "glm4", "phi", "phi3", "qwen3", "gemma2", "granite", "mistral"]
SHARED = ["gemma3", "qwen2.5-vl", "qwen3-vl", "glm4v", "paligemma2", "cohere2-vision", "internvl"]


@functools.cache
def _eager(family: str) -> Any:
    return tiny_family(family).build(attention="eager")


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
@pytest.mark.parametrize("family", [*(f"llava-1.5/{name}" for name in DECODERS), *SHARED])
def test_s6_the_choice_is_the_top_of_the_models_own_row(
    family: str, method: str, layer: int
) -> None:
    """FastV ranks by the last row of layer K-1, PyramidDrop by that of layer K: whatever rotation,
    norms, soft-caps, windows or masks the decoder has, it is the row of eager's maps."""
    keep = 4
    eager = _eager(family)
    options = {"fastv": {"prune_before": layer}, "pyramiddrop": {"prune_before": (layer,)}}[method]
    case = case_of(make_method(method, keep=keep, **options), family, SHAPES["ragged"], eager)
    inputs = case.inputs()
    with torch.no_grad():
        numbers = prompt_positions(eager, inputs)
        maps = eager(**inputs, **numbers, output_attentions=True).attentions
    row = maps[layer - 1 if method == "fastv" else layer][:, :, -1].mean(1)
    backends = tiny_family(family).backends
    if family == "llava-1.5/stablelm" and not TYPED:
        with pytest.raises(UnsupportedModelError, match="computes its attention by itself"):
            case.prefill(inputs)
        return
    for backend in backends:
        model = eager if backend == "eager" else tiny_family(family).build(attention=backend)
        _, prefill = case.having(model=model).prefill(inputs)
        assert dropped(prefill)
        compared = 0
        for image in prefill.images:
            if sum(other.row == image.row for other in prefill.images) > 1:
                continue  # tiles of one prompt share a ranking
            score = row[image.row, image.columns]
            apart = score.sort(descending=True).values
            if apart[keep - 1] - apart[keep] < 1e-5:  # a window hides the image: all are alike
                continue
            compared += 1
            best = image.columns[score.topk(keep).indices].sort().values
            at = prefill.layers[layer]
            own = at.column[image.row][at.segment[image.row] == image.number]
            assert own.tolist() == best.tolist()
        ranked = bind(model).parts.decoder_layers[layer - (method == "fastv")]
        assert compared or ranked.window is not None


# ------------------------------------------------------------------------------- S7


ENDS: dict[str, Prompts] = {
    "nothing else": [["image"]],
    "at the end": [[4, "image"]],
    "two, nothing else": [["image", "image"]],
    "batch": [["image"], [4, "image"], [5, "image", 3], [4], [2, "image", 2, "image"]],
}
DRY: dict[str, Any] = {
    "nothing stays": DropInDecoder(keep=0, layer=2),
    "one, then nothing": tokprune.compose(
        make_method("random", keep=1), DropInDecoder(keep=0, layer=3)
    ),
    "fastv": make_method("fastv", keep=1, prune_before=2),
    "pyramiddrop": make_method("pyramiddrop", keep=1, prune_before=(1, 3)),
    "mustdrop": make_method(
        "mustdrop", spatial=False, key_rate=0.0, gamma=1.0, alpha=1.0, prune_before=(2, 4)
    ),
    "todre": make_method("todre", keep=1, tau=1.0, prune_before=4),
    "sparsevlm": make_method(
        "sparsevlm", keep=None, prune_before=(2, 4), recycle=0, rank_scale=0.1
    ),
    "divprune": make_method("divprune", keep=1),
}


@pytest.mark.parametrize("method", DRY)
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("family", ["llava-1.5", "llava-next", "gemma4", "video-llava", "smolvlm"])
def test_s7_the_last_token_of_a_row_stays(family: str, ends: str, method: str) -> None:
    if family not in tiny_families():
        pytest.skip("not in this release of transformers")
    case = case_of(DRY[method], family, ENDS[ends])
    found = equals_oracle(case)
    last = case.inputs()["input_ids"].shape[1] - 1
    for layer in found.prefill.layers:
        for row in range(len(ENDS[ends])):
            alive = layer.column[row][layer.column[row] >= 0]
            assert alive.numel()
            assert int(alive[-1]) == last
    assert found.got.isfinite().all()


# ------------------------------------------------------------------------------- S8


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [1.0, 500, 5, 4])
@pytest.mark.parametrize("method", ["random", "fastv"])
@pytest.mark.parametrize("family", ["llava-1.5", "llava-next", "qwen2.5-vl", "qwen3-vl", "gemma3"])
def test_s8_the_last_logits_are_those_of_the_last_token(
    family: str, method: str, keep: float, side: str
) -> None:
    """Whether or not something was dropped, a batch with images comes back right-aligned, so that
    ``logits[:, -1]`` is read at the last real token of every row."""
    tiny_ = tiny_family(family)
    model = tiny_.build(attention="sdpa")
    if keep == 500:
        keep = 1.0
        method_ = tokprune.compose(make_method("random", keep=1.0), make_method("fastv", keep=1.0))
    else:
        method_ = make_method(method, keep=keep)
    case = Case(method_, tiny_, model, SHAPES["ragged"])
    batch_equals_singles(case, pad_side=side)
    inputs = case.inputs(pad_side=side)
    out, prefill = case.prefill(inputs)
    assert bool(dropped(prefill)) == (keep != 1.0)
    for row in range(4):
        one = case.row(inputs, row)
        with torch.no_grad(), case.compress():
            want = model(**one, **prompt_positions(model, one)).logits[:, -1]
        assert_same_logits(out.logits[row : row + 1, -1], want, f"row {row}:")


def test_s8_the_cache_of_a_batch_in_which_nothing_went_is_as_it_was() -> None:
    """Only the output is aligned: a later step on the cache is the unpatched model's."""
    tiny_ = tiny_family("llava-1.5")
    model = tiny_.build(attention="sdpa")
    case = Case(make_method("random", keep=1.0), tiny_, model, SHAPES["ragged"])
    inputs = case.inputs(pad_side="right")
    numbers = prompt_positions(model, inputs)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {
        "input_ids": continuation_tokens(4, 1),
        "attention_mask": mask,
        "position_ids": mask.sum(1, keepdim=True) - 1,
    }
    with torch.no_grad():
        cache = model(**inputs, **numbers, use_cache=True).past_key_values
        want = model(**step, past_key_values=cache).logits
        with case.compress():
            cache = model(**inputs, **numbers, use_cache=True).past_key_values
            assert not any(isinstance(layer, CompressedLayer) for layer in cache.layers)
            got = model(**step, past_key_values=cache).logits
    assert torch.equal(got, want)
