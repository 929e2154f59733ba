"""VScan beyond its golden cases: shares of windows, budgets of both stages, layers of the scans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import llava_next, make_inputs

import tokprune
from tokprune.engine.model import TowerFacts
from tokprune.methods import VScan
from tokprune.operators.vscan import grid_windows, local_best, two_scans


def test_cells_left_over_belong_to_the_last_windows() -> None:
    got = grid_windows((5, 7), 3).view(5, 7)
    assert got.tolist() == [[0, 0, 0, 1, 1, 1, 1]] * 5
    assert grid_windows((2, 2), 6).tolist() == [0, 0, 0, 0]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=24), st.floats(0, 1), st.integers(0, 999))
def test_windows_take_turns(window: list[int], share: float, seed: int) -> None:
    """Round after round the best that a window has left; what is over in the last round goes to
    the highest scores."""
    windows, budget = 4, int(share * len(window))
    # few values: ties
    score = torch.randint(0, 6, (len(window),), generator=torch.Generator().manual_seed(seed))
    left = {w: sorted((i for i, x in enumerate(window) if x == w), key=lambda i: -score[i])
            for w in range(windows)}  # fmt: skip
    want: list[int] = []
    while len(want) < budget:
        best = sorted((own.pop(0) for own in left.values() if own), key=lambda i: (-score[i], i))
        want += best[: budget - len(want)]
    got = local_best(score[None].float(), torch.tensor(window), windows, budget)[0].tolist()
    assert sorted(got) == sorted(want)
    assert got == sorted(got, key=lambda i: (window[i], -score[i], i))


@pytest.mark.parametrize("budget", [1, 5, 31, 100, 575])
@pytest.mark.parametrize("shares", ["spread", "limit"])
def test_every_budget_is_met(budget: int, shares: Any) -> None:
    shallow, deep = torch.rand(2, 2, 576, generator=torch.Generator().manual_seed(3))
    scans = two_scans(shallow, deep, grid_windows((24, 24), 6), 16, budget, shares)
    for row in torch.cat(scans, dim=1).tolist():
        assert len(set(row)) == len(row) == budget


def test_limits_are_lifted_only_where_no_window_has_room() -> None:
    score = torch.arange(8.0)[None]
    window = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1])
    assert local_best(score, window, 2, 3, "limit").tolist() == [[7, 6, 0]]
    assert local_best(score, window, 2, 4, "limit").tolist() == [[7, 6, 5, 0]]


def test_the_first_stage_keeps_three_times_the_second() -> None:
    assert VScan(keep=32).entering == 96
    assert VScan(keep=0.5).entering == 1.0
    assert VScan(keep=(90, 20), prune_before=(8, 16)).entering == 90
    # a fraction is one of the image's patches, in both stages
    both = VScan(input_keep=0.5, keep=0.25)
    assert both.count(0, 288) == 144
    assert VScan(keep=0.1).count(0, int(0.3 * 570)) == 57


@pytest.mark.parametrize("size", [(40, 40), (14, 40), (30, 22)])
def test_all_tiles_share_the_budget_of_an_image(size: tuple[int, int]) -> None:
    model = llava_next()
    with tokprune.compress(model, VScan(keep=10, prune_before=4)) as trace:
        model(**make_inputs(model, [[4, "image", 6]], sizes=[size]))
    (image,) = trace.last.images
    assert image.entered is not None
    tokens = torch.bincount(image.entered.tile)
    assert int(tokens.sum()) == 30
    sizes = [
        (bottom - top) * (right - left) for top, bottom, left, right in image.entered.windows()
    ]
    for own, cells in zip(tokens.tolist(), sizes):
        assert abs(own - 30 * cells / sum(sizes)) < 1
    assert trace.last.layers[-1].counts == [[10]]


@pytest.mark.parametrize(
    ("depth", "feature_layer", "whole", "layers"),
    [
        (24, 22, None, (5, 22)), (27, 26, None, (6, 26)), (2, 0, None, (0, 0)),
        (32, 31, (7, 15, 23, 31), (7, 31)), (24, None, None, (5, 22)),
    ],
)  # fmt: skip
def test_layers_of_the_scans(
    depth: int, feature_layer: int | None, whole: tuple[int, ...] | None, layers: tuple[int, int]
) -> None:
    tower = TowerFacts(depth, feature_layer, (24, 24), 576, True, False, whole_layers=whole)
    assert VScan(keep=9).scanned_layers(tower) == layers
    with pytest.raises(ValueError, match=r"shallow_layer=(31|6) should be"):
        VScan(keep=9, shallow_layer=6 if whole else 31).scanned_layers(tower)


@pytest.mark.parametrize(
    "options",
    [{"keep": 9, "input_keep": 8}, {"keep": 9, "input_keep": 0.5}, {"keep": 0.4, "input_keep": 9}],
)
def test_budgets_that_do_not_fit_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="input_keep no less than keep"):
        VScan(**options)
