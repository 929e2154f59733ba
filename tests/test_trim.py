"""TRIM with CLIP's text tower, against a slow reference; numbers by outliers; what it refuses."""

from __future__ import annotations

from statistics import quantiles
from typing import Any

import pytest
import torch
from test_merging_conformance import BATCHES, SIZES, Token, build, check, project, tile_grid, tower
from test_methods_dart_cdpruner_m3 import QUESTIONS, clip_of, prefill
from tiny import GRID, make_inputs, single
from torch import Tensor

import tokprune
from tokprune.methods import TRIM, ClipRelevance
from tokprune.operators.anyres import tile_windows
from tokprune.operators.outliers import outliers
from tokprune.operators.trim import keep_and_mean
from tokprune.testing import Case, tiny_family


@pytest.fixture(scope="module")
def models() -> dict[Any, Any]:
    return {}


def fence(values: list[float]) -> int:
    """How many values are above the upper fence."""
    low, _, high = quantiles(values, n=4, method="inclusive")
    return sum(value > high + 1.5 * (high - low) for value in values)


def trimmed_image(
    model: Any, tiles: Tensor, size: tuple[int, int], asked: ClipRelevance, keep: int | None,
    sign: int,
) -> list[Token]:  # fmt: skip
    """Kept patches of the base tile, those of all crops in raster order, the means."""
    clip, text = asked.clip, asked.embeds[0].mean(0)
    inner = getattr(clip.vision_model, "vision_model", clip.vision_model)
    across = tile_grid(model, size)[1] if len(tiles) > 1 else 0
    windows = [(0, GRID, 0, GRID)]
    if len(tiles) > 1:
        windows = list(tile_windows((GRID, GRID), tile_grid(model, size), size))
    kept: list[tuple[tuple[int, int, int], Token]] = []
    means: list[Token] = []
    for number, (pixels, (top, bottom, left, right)) in enumerate(zip(tiles, windows)):
        rows = tower(model, pixels, None).rows[1:]
        shown = [y * GRID + x for y in range(top, bottom) for x in range(left, right)]
        if not shown:
            continue
        joint = clip.visual_projection(inner.post_layernorm(rows))
        score = [sign * float(joint[j] @ text.double()) for j in shown]
        if keep is None:
            k = max(1, fence(torch.tensor(score).softmax(0).tolist()))
        else:
            k = keep - 1 if 1 < keep < len(shown) else min(keep, len(shown))
        best = sorted(sorted(range(len(shown)), key=lambda i: -score[i])[:k])
        rest = [j for i, j in enumerate(shown) if i not in best]
        for j in (shown[i] for i in best):
            y, x = divmod(j, GRID)
            where = (0, y, x)
            if number:
                down, over = divmod(number - 1, across)
                where = (1, down * GRID + y, over * GRID + x)
            kept.append((where, (project(model, rows[[j]])[0], {(number, j)})))
        if rest and keep != 1:
            feature = project(model, rows[rest].mean(0, keepdim=True))[0]
            means.append((feature, {(number, j) for j in rest}))
    return [token for _, token in sorted(kept, key=lambda pair: pair[0])] + means


@pytest.mark.parametrize(("keep", "sign"), [(9, None), (1, None), (20, 1), (None, None)])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_in_the_tower_of_clip(models: Any, family: str, keep: int | None, sign: Any) -> None:
    model = build(models, family, "sdpa")
    clip = clip_of(model)
    asked = ClipRelevance(clip, QUESTIONS[1])
    clip.double()  # as tower and projector are
    options = {"keep": keep, "relevance": asked, "sign": sign}

    def image_tokens(model: Any, tiles: Tensor, size: tuple[int, int]) -> list[Token]:
        return trimmed_image(model, tiles, size, asked, keep, sign or -1)

    check(model, "four", "trim", options, image_tokens)


def counts(model: Any, inputs: Any, method: TRIM) -> list[int]:
    return [sum(row) for row in prefill(model, inputs, method).layers[-1].counts]


def test_outliers_of_a_call_are_an_option(models: Any) -> None:
    """By default a picture keeps as many as alone; as published, all keep the same share."""
    model = build(models, "llava", "sdpa")
    inputs = make_inputs(model, BATCHES["four"], SIZES)
    asked = ClipRelevance(clip_of(model, seed=3), QUESTIONS[0])
    alone = [
        counts(model, single(inputs, b, slice(b, b + 1)), TRIM(relevance=asked))[0]
        for b in range(4)
    ]
    assert counts(model, inputs, TRIM(relevance=asked)) == alone
    assert len(set(alone)) > 1
    assert len(set(counts(model, inputs, TRIM(relevance=asked, outliers="call")))) == 1


def test_frames_that_are_pooled_behind_the_tower() -> None:
    """Patches are scored in the tower; tokens go, and join the mean, at the pooled frames."""
    tiny = tiny_family("llava-next-video")
    model = tiny.build()
    clip = clip_of(model)
    asked = ClipRelevance(clip, QUESTIONS[0])
    case = Case(TRIM(keep=3, relevance=asked), tiny, model, [[4, "video", 6], [3, "image", 5]])
    with tokprune.compress(model, case.method, validate=True) as trace, torch.no_grad():
        model(**case.inputs())
    assert trace.last is not None
    video = trace.last.images[0]
    assert video.record is not None
    layout = video.record.layout
    assert layout.token_grid is not None
    assert trace.last.layers[-1].counts[0] == [3 * len(layout.token_grid.grids)]
    assert video.selection is not None
    assert video.selection.group is not None
    assert (video.selection.group >= 0).tolist() == (layout.packed >= 0).tolist()


def test_after_a_method_in_the_encoder_survivors_are_one_tile(models: Any) -> None:
    model = build(models, "llava_next", "sdpa")
    inputs = make_inputs(model, BATCHES["four"], SIZES)
    both = tokprune.compose(tokprune.FasterVLM(keep=12), TRIM(keep=7))
    assert prefill(model, inputs, both).layers[-1].counts == [[7]] * 4


def test_without_the_mean_the_rest_goes(models: Any) -> None:
    model = build(models, "llava", "sdpa")
    inputs = make_inputs(model, BATCHES["single"])
    last = prefill(model, inputs, TRIM(keep=7, aggregate=False))
    whole = prefill(model, inputs, TRIM(keep=8))
    assert last.images[0].selection.features is None
    assert last.images[0].selection.index.tolist() == whole.images[0].selection.index.tolist()[:-1]


def test_option_errors(models: Any) -> None:
    with pytest.raises(ValueError, match="relevance='clip' should be 'text' or a ClipRelevance"):
        TRIM(relevance="clip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sign=2 should be one of -1, 1"):
        TRIM(sign=2)  # type: ignore[arg-type]
    asked = ClipRelevance(clip_of(build(models, "llava", "sdpa")), QUESTIONS[0])
    with pytest.raises(tokprune.UnsupportedModelError, match="inside the vision encoder"):
        tokprune.patch(tiny_family("qwen2.5-vl").build(), TRIM(keep=3, relevance=asked))


def test_operators_take_the_edges() -> None:
    x, score = torch.randn(2, 5, 3), torch.tensor([[1.0, 1, 1, 1, 1], [0, 5, 2, 5, 1]])
    some = keep_and_mean(x, score, 2)
    assert some.kept.tolist() == [[0, 1], [1, 3]]
    assert some.group.tolist() == [[0, 1, 2, 2, 2], [2, 0, 2, 1, 2]]
    assert some.rows.tolist() == [[0, 1, 4], [1, 3, 4]]
    assert torch.equal(keep_and_mean(x, score, 5).out, x)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k is {k}; it should be between 1 and"):
            keep_and_mean(x, score, k)
    assert not outliers(torch.ones(4)).any()
    assert outliers(torch.tensor([1.0, 2, 3, 4, 100])).tolist() == [False] * 4 + [True]
