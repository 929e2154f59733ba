"""CLSE: detail by a plain transform, the first cut against the model's own hidden states on the
grids of its tiles, budgets, and what it refuses."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from tiny import VIDEO_BUILDERS, llava, llava_next, make_inputs
from torch import Tensor

import tokprune
from tokprune.errors import CompositionError
from tokprune.methods import CLSE
from tokprune.methods.clse_stage import CLSERun
from tokprune.operators import clse
from tokprune.operators.clse import evolution, spectral
from tokprune.testing import Case, tiny_family
from tokprune.testing.families import BUILT_IN
from tokprune.testing.grid_prompts import TYPED
from tokprune.testing.oracle import compressed_logits, continuation_tokens

SIZES = [(14, 40), (40, 14), (30, 22), (10, 72)]

# ------------------------------------------------------------------------------ operators


def plain_spectral(x: Tensor, grid: tuple[int, int], cutoff: float) -> Tensor:
    """Of one grid [h·w, C], by the definition of the transform."""
    h, w = grid
    cells = [(y, z) for y in range(h) for z in range(w)]
    spread = min(h // 2, w // 2) * cutoff
    found = torch.zeros(h * w, dtype=torch.float64)
    for channel in x.double().unbind(1):
        out = [0j] * (h * w)
        for row in range(h):  # shifted: frequency 0 at (h // 2, w // 2)
            for col in range(w):
                fy, fx = row - h // 2, col - w // 2
                passed = 1 - math.exp(-(fy**2 + fx**2) / (2 * spread**2)) if spread else 1.0
                waves = [cmath.exp(2j * math.pi * (fy * y / h + fx * z / w)) for y, z in cells]
                total = sum(v * wave.conjugate() for v, wave in zip(channel.tolist(), waves))
                for i, wave in enumerate(waves):
                    out[i] += passed * total * wave / (h * w)
        found += torch.tensor([abs(v) for v in out], dtype=torch.float64)
    return found / x.shape[1]


@pytest.mark.parametrize(("grid", "cutoff"), [((4, 6), 0.2), ((5, 3), 0.7), ((1, 4), 0.3),
                                              ((2, 2), 0.0)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_spectral_is_the_transform(grid: Any, cutoff: float, dtype: torch.dtype) -> None:
    x = torch.randn(2, 2 * math.prod(grid), 3, generator=torch.Generator().manual_seed(0))
    x = (x * 100).to(dtype)
    got = spectral(x, grid, cutoff)
    for b in range(2):
        for frame, own in zip(x[b].chunk(2), got[b].chunk(2)):
            torch.testing.assert_close(own.double(), plain_spectral(frame, grid, cutoff),
                                       rtol=1e-5, atol=1e-4)  # fmt: skip


def test_channels_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 24, 7, generator=torch.Generator().manual_seed(1))
    want = spectral(x, (4, 6))
    monkeypatch.setattr(clse, "_AT_ONCE", 60)
    torch.testing.assert_close(spectral(x, (4, 6)), want)


def test_evolution() -> None:
    before, after = torch.tensor([[1.0, 2.0, 3.0, 2.0]]), torch.tensor([[1.5, 2.0, 9.0, 2.0]])
    change = torch.tensor([0.5 / 3, 0.0, 1.0, 0.0])  # the third one is more than all there was
    factor = torch.sigmoid((change - change.mean()) / change.std() / 0.5)
    torch.testing.assert_close(evolution(before, after, 0.5)[0], factor, rtol=1e-4, atol=1e-6)
    assert evolution(before, 3 * before).unique().numel() == 3  # small ones change less of the mean
    assert evolution(before[:, :1], after[:, :1]).tolist() == [[0.5]]
    assert evolution(torch.ones(5), torch.ones(5)).tolist() == [0.5] * 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: spectral(x, (2, 2)), r"x has shape \(6, 3\); with grid=\(2, 2\) it should be"),
        (lambda x: spectral(x, (2, 3), -1.0), "cutoff is -1.0; it should be at least 0"),
        (lambda x: evolution(x, x[:2]), r"before has shape \(6, 3\) and after \(2, 3\)"),
        (lambda x: evolution(x, x, 0.0), "temperature is 0.0; it should be above 0"),
    ],
)
def test_operators_refuse(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(6, 3))


# ------------------------------------------------------------------------------ in a model


def plain_factor(before: Tensor, after: Tensor, packed: Tensor, cutoff: float) -> Tensor:
    """[n] of an image of 6×6 tiles whose prompt tokens [n, D] take the cells ``packed`` (−1: a
    newline): every tile is what it shows of its grid."""
    cells = [i for i in range(len(packed)) if packed[i] >= 0]
    by_tile: dict[int, list[int]] = {}
    for i in sorted(cells, key=lambda i: int(packed[i])):
        by_tile.setdefault(int(packed[i]) // 36, []).append(i)
    detail = torch.zeros(2, len(packed), dtype=torch.float64)
    for own in by_tile.values():
        rows = len({int(packed[i]) % 36 // 6 for i in own})
        for k, x in enumerate((before, after)):
            detail[k, own] = plain_spectral(x[own], (rows, len(own) // rows), cutoff)
    a, b = detail[:, cells]
    change = ((b - a).abs() / (a.mean() + a + 1e-6)).clamp(max=1)
    factor = torch.full((len(packed),), 0.5, dtype=torch.float64)
    factor[cells] = torch.sigmoid((change - change.mean()) / (change.std() + 1e-6) / 0.1)
    return factor


@pytest.mark.parametrize("first_cut", ["clse_attn", "clse"])
@pytest.mark.parametrize("layer", [1, 3])
def test_the_first_cut_by_the_models_own_states(layer: int, first_cut: Any) -> None:
    """A padded batch, several images, crops cut by the unpadding, newlines."""
    model = llava_next(attention="eager")
    inputs = make_inputs(model, [[4, "image", 2, "image", 6], [7, "image", 9]], SIZES[:3])
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    method = CLSE(17, prune_before=(layer, layer + 2), first_cut=first_cut, cutoff=0.3)
    with tokprune.compress(model, method, validate=True) as trace, torch.no_grad():
        model(**inputs)
    before, after = trace.last.layers[layer - 1], trace.last.layers[layer]
    images = iter(trace.last.images)
    for b, counts in enumerate(before.counts):
        for s in range(len(counts)):
            own = (before.segment[b] == s).nonzero().view(-1)
            record = next(images).record
            assert record is not None
            states = [out.hidden_states[layer + k][b, own] for k in (-1, 0)]
            score = plain_factor(*states, record.layout.packed, 0.3)
            if first_cut == "clse_attn":
                score = score * out.attentions[layer - 1][b, :, -1, own].double().mean(0)
            # the factor is 1 for many in float32: then the first ones stay
            order = score.float().sort(descending=True, stable=True).indices
            best = own[order[: after.counts[b][s]]]
            kept = after.column[b][after.segment[b] == s]
            assert kept.tolist() == before.column[b][best].sort().values.tolist()


def test_later_cuts_rank_by_attention_alone() -> None:
    """So that a first cut that drops nothing leaves FastV."""
    model = llava_next()
    inputs = make_inputs(model, [[4, "image", 6]], SIZES[:1])
    kept = []
    for method in (CLSE((1.0, 7), prune_before=(1, 3)), tokprune.methods.FastV(7, prune_before=3)):
        with tokprune.compress(model, method) as trace, torch.no_grad():
            model(**inputs)
        kept.append([layer.column.tolist() for layer in trace.last.layers])
    assert kept[0] == kept[1]


#: StableLM of transformers 4 computes its attention by itself
RANKED = [family for family in BUILT_IN if TYPED or family != "llava-1.5/stablelm"]


@pytest.mark.parametrize("family", RANKED)
def test_every_token_on_a_grid_has_a_cell(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every cell of the grids a token, of its own; so for videos."""
    tiny = tiny_family(family)
    model = tiny.build(attention=tiny.backends[-1])
    runs: list[CLSERun] = []
    made = CLSERun.__init__

    def watched(self: CLSERun, *args: Any) -> None:
        made(self, *args)
        runs.append(self)

    monkeypatch.setattr(CLSERun, "__init__", watched)
    kinds = ["image", *["video"] * bool(tiny.videos)]
    for kind in kinds:
        prompts = [[4, kind, 2, kind, 6], [3, kind, 9]]
        case = Case(CLSE(3, prune_before=4), tiny, model, prompts, SIZES[:3])
        with case.compress() as trace, torch.no_grad():
            model(**case.inputs())
        images, cells = trace.last.images, 0
        for own in runs.pop().grids or []:
            for number, column in zip(own.numbers, own.column):
                entered = images[number].entered
                assert column.sort().values.tolist() == entered.column[entered.row >= 0].tolist()
                cells += len(column)
            assert own.runs[-1][2] == own.column.shape[1]
        assert cells > 0


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
def test_frames_share_their_statistics(family: str) -> None:
    """Cut to parts of a frame each, a video is ranked in another way."""
    model = VIDEO_BUILDERS[family]()
    inputs = make_inputs(model, [[4, "video", 6]])
    left = []
    for unit in ("video", "frame"):
        method = CLSE(0.5, prune_before=1, first_cut="clse", video_unit=unit)
        with tokprune.compress(model, method) as trace, torch.no_grad():
            model(**inputs)
        left.append(trace.last.layers[1])
    assert len(left[0].counts[0]) == 1 < len(left[1].counts[0])
    assert left[0].column.tolist() != left[1].column.tolist()


def test_embeddings_alone_say_nothing_of_grids() -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6]])
    visual = inputs["input_ids"] == model.config.image_token_id
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"].clamp(max=90))
    options: dict[str, Any] = {"keep": 5, "prune_before": (1, 2)}
    with (
        tokprune.visual_positions(visual),
        tokprune.compress(model, CLSE(**options)),
        pytest.raises(ValueError, match="pass input_ids and pixel_values instead, or first_cut="),
    ):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    with (
        tokprune.visual_positions(visual),
        tokprune.compress(model, CLSE(**options, first_cut="attn")) as trace,
        torch.no_grad(),
    ):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert trace.last is not None
    assert trace.last.layers[-1].counts == [[5]]


def test_caches_of_all_layers_hold_the_last_budget() -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6], [7, "image", 9]])
    with tokprune.compress(
        model, "clse", keep=(20, 11, 5), prune_before=(1, 3, 6), cut_earlier_caches=True
    ) as trace:
        compressed_logits(model, inputs, continuation_tokens(2, 2))
    assert [layer.cached for layer in trace.last.layers] == [[15, 21]] * 8


# ------------------------------------------------------------------------------ what is refused


def test_behind_other_methods() -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6]])
    options: dict[str, Any] = {"keep": 5, "prune_before": (1, 2)}
    divprune = tokprune.methods.DivPrune(9)
    pitome = tokprune.methods.PiToMe(12)
    for before, left in ((divprune, 9), (pitome, 12)):
        words = f"compares whole images, and {left} of the 36 tokens .* first_cut='attn' it ranks"
        with (
            tokprune.compress(model, tokprune.compose(before, CLSE(**options))),
            pytest.raises(CompositionError, match=words),
        ):
            model(**inputs)
    for before in (divprune, pitome):
        method = tokprune.compose(before, CLSE(**options, first_cut="attn"))
        with tokprune.compress(model, method) as trace, torch.no_grad():
            model(**inputs)
        assert trace.last.layers[-1].counts == [[5]]


# ------------------------------------------------------------------------------ budgets


def test_presets_say_what_they_cost() -> None:
    for preset in CLSE.presets:
        layers, entering = (28, 100000) if preset.model == "qwen2-vl" else (32, 576)
        made = CLSE.preset(preset.model, preset.budget)
        counts = [entering, *(made.count(step, entering) for step in range(3))]
        ends = [0, *made.steps, layers]
        mean = sum(n * (b - a) for n, a, b in zip(counts, ends, ends[1:])) / layers
        said = f"{mean / entering:.3f}" if layers == 28 else f"{round(mean)} of {entering}"
        assert preset.source.endswith(said)


@pytest.mark.parametrize(
    ("keep", "tokens", "counts"),
    [
        (62, 576, [330, 210, 62]),
        (0.5, 100, [100, 100, 50]),
        (8, 30, [30, 27, 8]),
        (5, 0, [0, 0, 0]),
        ((0.57, 0.36, 0.098), 10, [5, 3, 1]),
        ((330, 210, 62), 144, [144, 144, 62]),
    ],
)
def test_counts(keep: Any, tokens: int, counts: list[int]) -> None:
    assert [CLSE(keep).count(step, tokens) for step in range(3)] == counts


def test_other_numbers_of_cuts() -> None:
    assert [CLSE(0.25, prune_before=(1, 2)).count(step, 64) for step in range(2)] == [32, 16]
    assert CLSE.options_for_depth(8) == {"prune_before": (1, 4, 6)}
    assert CLSE.options_for_depth(28) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_cut": "both"}, "first_cut='both' should be one of 'clse_attn', 'clse', 'attn'"),
        ({"cutoff": -0.1}, "cutoff=-0.1 should be in"),
        ({"temperature": 0.0}, "temperature=0.0 should be in"),
        ({"keep": (5, 3)}, r"keep=\(5, 3\) should hold one budget per layer of prune_before, 3 in"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLSE(**{"keep": 5, **options})
