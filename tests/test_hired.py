"""HiRED beyond its golden cases: true regions, whole budgets, tiles of different sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import llava_next, make_inputs

import tokprune
from tokprune.methods import HiRED
from tokprune.operators.anyres import tile_windows
from tokprune.operators.budgets import limit_budgets, proportional_budgets
from tokprune.operators.hired import band_regions, crop_budgets, crop_regions

whole_numbers = st.lists(st.integers(0, 30), min_size=1, max_size=7)


@settings(deadline=None)
@given(whole_numbers.filter(any), st.integers(0, 90))
def test_a_total_is_divided_without_rest(weights: list[int], total: int) -> None:
    (got,) = proportional_budgets(torch.tensor([weights]), total).tolist()
    assert sum(got) == total
    for own, weight in zip(got, weights):
        assert abs(own - weight * total / sum(weights)) < 1


@settings(deadline=None)
@given(st.data(), whole_numbers)
def test_limits_hold_and_nothing_is_lost(data: st.DataObject, limits: list[int]) -> None:
    size = len(limits)
    lists = st.lists(st.integers(0, 30), min_size=size, max_size=size)
    budget, priority = data.draw(lists), data.draw(lists)
    total = data.draw(st.integers(0, sum(limits)))
    own = [min(pair) for pair in zip(budget, limits)]
    for part in sorted(range(size), key=lambda i: -priority[i]):
        own[part] += min(limits[part] - own[part], max(0, total - sum(own)))
    rows = (torch.tensor([row]) for row in (budget, limits, priority))
    assert limit_budgets(*rows, total).tolist() == [own]


def test_regions_are_what_the_crops_show() -> None:
    quarters = crop_regions((4, 4), (2, 2), tile_windows((4, 4), (2, 2), (40, 40))[1:])
    assert quarters.view(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert band_regions(16, 4).view(4, 4)[:, 0].tolist() == [0, 1, 2, 3]
    # padding above and below: of 2 × 6 rows 3 + 5 show the image
    windows = [(3, 6, 0, 6), (3, 6, 0, 6), (0, 5, 0, 6), (0, 5, 0, 6)]
    assert crop_regions((6, 6), (2, 2), windows).view(6, 6)[:, 0].tolist() == [0, 0, 2, 2, 2, 2]
    # a row of crops that is padding alone decides on nothing
    windows = [(0, 6, 0, 6), (0, 0, 0, 6)]
    assert set(crop_regions((6, 6), (2, 1), windows).tolist()) == {0}


def test_crops_get_what_their_part_of_the_image_is_looked_at() -> None:
    first = torch.zeros(1, 4, 4)
    first[0, :2, 2:] = 1.0  # the corner at the top right
    region = crop_regions((4, 4), (2, 2), [(0, 4, 0, 4)] * 4)
    got = crop_budgets(first.flatten(1), region, [16] * 4, 12, alpha=0.75)
    assert got.tolist() == [[0, 12, 0, 0]]
    overfull = crop_budgets(first.flatten(1), region, [16, 5, 16, 16], 12, alpha=0.75)
    assert overfull.tolist() == [[7, 5, 0, 0]]
    floor = crop_budgets(first.flatten(1), region, [16, 5, 16, 16], 12, 0.75, rounding="floor")
    assert floor.tolist() == [[0, 5, 0, 0]]
    none_marked = crop_budgets(first.flatten(1), region, [16] * 4, 10, alpha=1.0)
    assert none_marked.tolist() == [[3, 3, 2, 2]]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [(40, 40), (14, 40), (30, 22)])
def test_an_image_keeps_its_budget_and_the_base_tile_its_share(
    size: tuple[int, int], alpha: float
) -> None:
    model = llava_next()
    with tokprune.compress(model, HiRED(keep=24, alpha=alpha)) as trace:
        model(**make_inputs(model, [[4, "image", 6]], sizes=[size]))
    (image,) = trace.last.images
    assert image.entered is not None
    base = image.entered.tile == 0
    assert len(base) == 24
    assert int(base.sum()) == int(24 * alpha)
