"""Every method on every family against the masked oracle, under every attention backend.

The whole product (marked ``full``) is method × family × backend × shape of the prompts; the default
run is a cover of it: every pair of family and backend, family and shape, method and shape, and of
method and family where the family is one of those that together exercise everything. Flash
attention is the double of :mod:`flash_double`; the oracle of a model under it is the model of the
same weights under sdpa or eager.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from family_cases import (
    FAMILIES,
    FLASH,
    IN_TOWER,
    METHODS,
    OF_VIDEOS,
    SHAPES,
    TURN,
    Cell,
    case_of,
    cover,
    double_installed,
    has_gaps,
    in_window,
    model_of,
    pairs_of,
    plain_backend,
    product,
    refusal_of_flash,
    unpatched_difference,
)
from torch import Tensor

import tokprune
from tokprune.engine.contracts import DecoderRun, DecoderStage, ModelFacts, Plan
from tokprune.errors import UnsupportedModelError, UnsupportedVideoError
from tokprune.families import bind
from tokprune.methods import Method, make_method
from tokprune.testing import assert_same_logits, tiny_family
from tokprune.testing.case import Prompts, dropped
from tokprune.testing.checks.decisions import batch_equals_singles
from tokprune.testing.checks.leftovers import leaves_nothing
from tokprune.testing.checks.numbers import equals_oracle, keeps_everything
from tokprune.testing.grid_prompts import TYPED
from tokprune.testing.tiny_gemma import gemma3

CELLS = product()
COVER = cover(CELLS)
REST = sorted(set(CELLS) - set(COVER), key=str)

#: what families without flash attention say
REFUSALS = r"does not support Flash Attention|hides from the tokens of an image"
FLASHLESS = {"gemma3", "gemma4", "paligemma", "paligemma2"}
#: what transformers gets wrong under flash attention without any patch: (family, shapes)
WRONG_UNPATCHED = {
    # layers get positions of three axes, which flash attention takes for three packed prompts
    "glm4v-moe": {"single", "two"},
    # the tower does not mask the patches that pad an image
    "smolvlm": {"ragged"},
    "idefics3": {"ragged"},
}
if not TYPED:  # up to transformers 4 the Pixtral tower hands flash attention positions of one axis
    WRONG_UNPATCHED |= {"mistral3": set(SHAPES), "llava-pixtral": set(SHAPES)}
#: families whose grids of tokens no nested pooling divides
UNEVEN = {
    "gemma4", "glm4v", "llava-pixtral", "mistral3", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5",
}  # fmt: skip
EVEN = ("gemma4", "single")
#: families whose attention methods can rank by: StableLM of transformers 4 computes it by itself
RANKED = [family for family in FAMILIES if TYPED or family != "llava-1.5/stablelm"]
#: families whose layers get rotary tables of three axes, or of two kinds, up to transformers 4
SEVERAL_TABLES = {"qwen2-vl", "qwen2.5-vl", "glm4v", "glm4v-moe", "glm46v", "gemma3"}
#: the engine's own refusal: a window counts under flash what is left, and not what went
WINDOWED = "flash attention counts the tokens that are left in a sliding window"


@pytest.fixture(scope="module", autouse=True)
def flash() -> Iterator[None]:
    yield from double_installed()


def check(cell: Cell) -> None:
    if cell.backend == FLASH and (cell.family in FLASHLESS):
        refusal = refusal_of_flash(cell.family)
        assert refusal is not None
        with pytest.raises(ValueError, match=REFUSALS):
            _fail(refusal)
        return
    model = model_of(cell.family, cell.backend)
    oracle = model if cell.backend != FLASH else model_of(cell.family, plain_backend(cell.family))
    case = case_of(cell.method, cell.family, SHAPES[cell.shape], model)
    facts = bind(model).facts
    if (words := _refused_by_plan(case.method, facts)) is not None:
        # who only looks at the encoder needs one that can be looked at
        assert cell.method in IN_TOWER or facts.observed is None
        assert facts.tower is None
        assert case.method.name in words
        return
    tolerance = case.family.tolerance
    if cell.backend == FLASH:
        apart = unpatched_difference(cell.family, cell.shape)
        wrong = cell.shape in WRONG_UNPATCHED.get(cell.family, ())
        assert (apart > 2e-5) == wrong, (
            f"unpatched, flash and {plain_backend(cell.family)}: {apart}"
        )
        if wrong:
            pytest.skip("transformers is wrong there without any patch: WRONG_UNPATCHED")
        tolerance = 2 * max(tolerance, apart)  # two kernels round differently
    turn = TURN if cell.shape == "turn" else 0
    refused = _refusal(cell, facts)
    if refused is None and cell.backend == FLASH and in_window(cell.family):
        plain = equals_oracle(case.having(model=oracle), turn=turn)
        refused = WINDOWED if has_gaps(plain.prefill) else None
    if refused is not None:
        kind: Any = (UnsupportedVideoError, UnsupportedModelError, ValueError)
        with pytest.raises(kind, match=refused):
            equals_oracle(case, turn=turn, oracle=oracle)
        return
    found = equals_oracle(case, turn=turn, oracle=oracle, tolerance=tolerance)
    assert found.want is not None, found.said
    assert dropped(found.prefill), "the method dropped nothing: the comparison would show nothing"


def _refused_by_plan(method: Method, facts: ModelFacts) -> str | None:
    try:
        method.plan(facts)
    except UnsupportedModelError as error:
        return str(error)
    return None


def _fail(words: str) -> None:
    raise ValueError(words)


def _refusal(cell: Cell, facts: ModelFacts) -> str | None:
    """What a method says to a case that it cannot do, None where it can."""
    method, options = METHODS[cell.method]
    # a single image of Gemma 4's is even
    if method == "m3" and facts.family in UNEVEN and (cell.family, cell.shape) != EVEN:
        return "no nested scale"
    if cell.shape == "video" and facts.axes > 1 and options.get("positions") == "compact":
        return "positions='compact' is not defined for videos"
    pools = cell.family in ("llava-next-video", "llava-onevision")
    if cell.shape == "video" and pools and options.get("place") == "encoder":
        return "place='encoder' clusters still images"
    if cell.shape == "video" and pools and any(s.reduces_videos for s in _plan(cell).encoder):
        return "drops or merges tokens inside the vision tower"
    if cell.family not in RANKED and ("rectify" in options or _plan(cell).decoder):
        return "computes its attention by itself"
    if not TYPED and cell.method == "sparsevlm-plus" and cell.family in SEVERAL_TABLES:
        return "reads rotary tables"
    if "rectify" in options and cell.family == "llava-1.5/stablelm":
        return "do not hand their attention what they are given"
    if "distance" in str(options.get("rectify")) and cell.backend == FLASH:
        return "adds a term of queries and keys"
    if method == "tome" and cell.backend == FLASH:
        return "proportional attention needs an additive bias"
    return None


def _plan(cell: Cell) -> Plan:
    case = case_of(cell.method, cell.family, SHAPES["video"])
    return case.method.plan(bind(case.model).facts)


@pytest.mark.parametrize("cell", COVER, ids=str)
def test_cover(cell: Cell) -> None:
    check(cell)


@pytest.mark.full
@pytest.mark.parametrize("cell", REST, ids=str)
def test_rest_of_the_product(cell: Cell) -> None:
    check(cell)


def test_the_cover_holds_every_pair() -> None:
    assert {p for cell in COVER for p in pairs_of(cell)} == {p for c in CELLS for p in pairs_of(c)}
    assert len(COVER) < len(CELLS) / 10
    assert set(COVER) <= set(CELLS)
    shown = {cell.method for cell in COVER if cell.family in FAMILIES[:4]}
    assert shown >= OF_VIDEOS


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_is_refused_by_name_or_taken(family: str) -> None:
    refusal = refusal_of_flash(family)
    assert (refusal is not None) == (family in FLASHLESS), refusal
    if refusal is not None:
        name = type(model_of(family, plain_backend(family))).__name__
        assert name in refusal or name.replace("ForConditionalGeneration", "Model") in refusal


# ------------------------------------------------------------------------------- what is special


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", ["ragged", "turn", "two"])
@pytest.mark.parametrize("positions", ["preserve", "compact"])
@pytest.mark.parametrize(
    "window", [6, 25, *[pytest.param(width, marks=pytest.mark.full) for width in (3, 15, 60)]]
)
@pytest.mark.parametrize("method", [("random", {"keep": 6}), ("fastv", {"keep": 6})])
def test_windows_of_gemma_3(
    method: tuple[str, dict[str, Any]], window: int, positions: str, shape: str, backend: str
) -> None:
    """An image has 16 tokens: shorter than the window, longer, and longer than what is left."""
    made = make_method(method[0], **method[1], positions=positions)
    case = case_of(made, "gemma3", SHAPES[shape], gemma3(attention=backend, window=window))
    found = equals_oracle(case, steps=4, turn=TURN if shape == "turn" else 0)
    assert dropped(found.prefill)


@pytest.mark.parametrize("shape", ["ragged", "two", "turn", "video"])
@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["qwen3-vl", "qwen3-vl-moe"])
def test_cuts_inside_the_layers_with_deep_features(family: str, layer: int, shape: str) -> None:
    """Features of the tower are added after layers 0, 1 and 2; the cut falls between, and once
    more behind."""
    turn = TURN if shape == "turn" else 0
    for method in (
        make_method("fastv", keep=4, prune_before=layer),
        make_method("pyramiddrop", keep=2, prune_before=(layer, layer + 1)),
    ):
        assert dropped(equals_oracle(case_of(method, family, SHAPES[shape]), turn=turn).prefill)


MROPE = [f for f in FAMILIES if f.startswith(("qwen", "glm"))]


@pytest.mark.parametrize("positions", ["preserve", "compact"])
@pytest.mark.parametrize("family", MROPE)
def test_rows_whose_deltas_differ(family: str, positions: str) -> None:
    """What a row's images take of the position axis less than of the sequence differs by row."""
    prompts: Prompts = [[4, "image", 6], [3, "image", 1, "image", 2], [9], [2, "image", 3]]
    for name, options in (("random", {}), ("fastv", {"prune_before": 2})):
        method = make_method(name, keep=4, positions=positions, **options)
        case = case_of(method, family, prompts)
        for turn in (0, TURN):
            if bind(case.model).facts.attention_layers is not None and name == "fastv":
                case = case.having(method=make_method("fastv", keep=4, prune_before=4))
            assert dropped(equals_oracle(case, turn=turn).prefill)
        assert len(set(case.model.model.rope_deltas.flatten().tolist())) >= 3


@pytest.mark.parametrize("method", ["random-preserve", "fastv", "pyramiddrop-preserve", "evs"])
@pytest.mark.parametrize("family", [f for f in MROPE if f.startswith(("qwen3", "glm"))])
def test_videos_whose_frames_are_islands(family: str, method: str) -> None:
    """Text stands between the frames; it stays, and the video is compressed as one."""
    facts = bind(model_of(family, "sdpa")).facts
    if facts.attention_layers is not None and method != "random-preserve" and method != "evs":
        pytest.skip("a hybrid decoder: layers without attention rank nothing")
    shapes: list[Prompts] = [SHAPES["video"]]
    if tiny_family(family).mixed:
        shapes.append([[4, "video", 3, "image", 6], [7, "image", 1, "video", 9], [2, "image", 3]])
    if method == "evs":
        shapes = shapes[:1]
    for prompts in shapes:
        case = case_of(method, family, prompts)
        inputs = case.inputs()
        found = equals_oracle(case)
        assert dropped(found.prefill)
        clip = next(image for image in found.prefill.images if image.record.layout.video)
        assert int((clip.columns.diff() > 1).sum()) >= 1
        gone = found.prefill.layers[-1].column[0]
        text = inputs["input_ids"][0] < 90
        kept = set(gone[gone >= 0].tolist())
        real = inputs["attention_mask"][0] != 0
        assert {int(c) for c in (text & real).nonzero()} <= kept


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("method", ["random", "fastv", "divprune-published", "random-compact"])
@pytest.mark.parametrize("family", ["paligemma", "paligemma2"])
def test_the_prefix_of_paligemma_sees_itself_both_ways(
    family: str, method: str, backend: str
) -> None:
    """Survivors see the text after them, as all of the prefix does: changing the last token of the
    prompt changes what its first layers make of the image."""
    if backend not in tiny_family(family).backends:
        pytest.skip("transformers has Gemma 2 in eager only")
    case = case_of(method, family, SHAPES["ragged"], model_of(family, backend))
    assert dropped(equals_oracle(case).prefill)
    one = case.having(prompts=SHAPES["single"])
    states = []
    for last in (5, 6):
        inputs = one.inputs()
        inputs["input_ids"][0, -1] = last
        out, _ = one.prefill(inputs, output_hidden_states=True)
        states.append(out.hidden_states[1][0, 0])
    assert not torch.equal(states[0], states[1])


# ------------------------------------------------------------------------------- on every family


KEEP_ALL = [("random", {"keep": 1.0}), ("fastv", {"keep": 1.0})]


def _attention_cut(family: str) -> dict[str, Any]:
    """``prune_before`` of FastV on a family."""
    layers = bind(model_of(family, plain_backend(family))).facts.attention_layers
    return {"prune_before": 2 if layers is None else min(layers) + 1}


@pytest.mark.parametrize("backend", ["eager", "sdpa", FLASH])
@pytest.mark.parametrize("family", RANKED)
def test_keeping_everything_changes_no_bit(family: str, backend: str) -> None:
    if backend not in (*tiny_family(family).backends, FLASH):
        pytest.skip("transformers has Gemma 2 in eager only")
    if backend == FLASH and family in FLASHLESS:
        pytest.skip("has no flash attention: test_flash_is_refused_by_name_or_taken")
    model = model_of(family, backend)
    for method in (
        make_method("random", keep=1.0),
        make_method("fastv", keep=1.0, **_attention_cut(family)),
    ):
        for shape in ("ragged", "single"):
            if backend == FLASH and shape in WRONG_UNPATCHED.get(family, ()):
                continue  # the model fails without any patch
            keeps_everything(case_of(method, family, SHAPES[shape], model))


@pytest.mark.parametrize("family", RANKED)
def test_unpatch_leaves_nothing(family: str) -> None:
    for method in (
        make_method("random", keep=4),
        make_method("fastv", keep=4, **_attention_cut(family)),
        make_method("transprune", keep=(6, 4), prune_before=(2, 4), transition_layers=(1, 3)),
    ):
        case = case_of(method, family, SHAPES["ragged"])
        facts = bind(case.model).facts
        if method.name == "transprune" and facts.attention_layers is not None:
            continue  # refused on hybrid decoders
        leaves_nothing(case)


@pytest.mark.parametrize("family", RANKED)
def test_batch_equals_singles(family: str) -> None:
    for method in (
        make_method("divprune", keep=4),
        make_method("fastv", keep=4, **_attention_cut(family)),
    ):
        for side in ("left", "right"):
            batch_equals_singles(case_of(method, family, SHAPES["ragged"]), pad_side=side)


class _Rows(DecoderRun):
    def __init__(self, layer: int, rows: list[Tensor]) -> None:
        self.layer, self.rows = layer, rows

    def attention(self, layer: int, attention: Any, sequence: Any) -> None:
        index = torch.arange(sequence.column.shape[1])[None].expand(len(sequence.column), -1)
        self.rows.append(attention.rows(index))


class _Watch(Method):
    """Looks at one layer's attention and drops nothing."""

    name = "test-watch"

    def __init__(self, layer: int, rows: list[Tensor]) -> None:
        self.layer, self.rows = layer, rows

    def plan(self, facts: ModelFacts) -> Plan:
        method = self

        class Stage(DecoderStage):
            prune_before = frozenset({method.layer + 1})
            ahead = frozenset()  # type: ignore[var-annotated]
            taps = frozenset({method.layer})

            def start(self) -> DecoderRun:
                return _Rows(method.layer, method.rows)

        return Plan(decoder=(Stage(),))


@pytest.mark.parametrize("family", RANKED)
def test_rows_are_those_that_the_model_itself_computes(family: str) -> None:
    """The rows that FastV ranks by, under every backend, are eager's ``output_attentions``: with
    q/k norms, windows, image blocks, prefixes, soft-caps and whatever rotation."""
    eager = model_of(family, "eager")
    case = case_of("random", family, SHAPES["ragged"], eager)
    inputs = case.inputs()
    facts = bind(eager).facts
    with torch.no_grad():
        maps = eager(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"] != 0
    backends = [*tiny_family(family).backends]
    if family not in FLASHLESS and "ragged" not in WRONG_UNPATCHED.get(family, ()):
        backends.append(FLASH)
    layers = range(facts.decoder_layers - 1) if facts.attention_layers is None else sorted(
        facts.attention_layers
    )[:1]  # fmt: skip
    for backend in backends:
        model = model_of(family, backend)
        for layer in layers:
            rows: list[Tensor] = []
            with tokprune.compress(model, _Watch(layer, rows)), torch.no_grad():
                model(**inputs)
            want = maps[layer if facts.attention_layers is None else 0]
            assert len(rows) == 1
            got, want = (x[real.nonzero()[:, 0], :, real.nonzero()[:, 1]] for x in (rows[0], want))
            # under another backend the hidden states that enter the layer are rounded differently
            tolerance = 1e-5 if backend == "eager" else 5e-5
            words = f"layer {layer} under {backend}: rows"
            assert_same_logits(got, want, words, tolerance=tolerance)
