"""PruneSID's groups, suppression and shares against slow twins; order on tiles; small budgets."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_tensors import few, generator, normal, seeds
from reference.packing import raster_pack
from tiny import GRID, llava, llava_next, make_inputs
from torch import Tensor

import tokprune
from tokprune.methods import PruneSID
from tokprune.operators.prunesid import (
    group_order,
    group_shares,
    mean_similarity,
    principal_groups,
)


def order_slowly(
    near: list[list[float]], group: list[int], score: list[float], threshold: float
) -> tuple[list[int], set[int]]:
    order: list[int] = []
    picks: set[int] = set()
    for g in sorted(set(group)):
        members = sorted((i for i in range(len(group)) if group[i] == g), key=lambda i: -score[i])
        left, own = list(members), []
        while left:
            own.append(left[0])
            left = [i for i in left[1:] if near[left[0]][i] <= threshold]
        order += own + [i for i in members if i not in own]
        picks |= set(own)
    return order, picks


@few
@given(seeds, st.integers(1, 30), st.integers(1, 5), st.floats(-0.5, 1.1))
def test_order_in_groups_equals_the_slow_twin(
    seed: int, n: int, groups: int, threshold: float
) -> None:
    x, score = normal(seed, 2, n, 4), normal(seed + 1, 2, n)
    group = torch.randint(groups, (2, n), generator=generator(seed))
    order, pick = group_order(x, group, score, torch.full((2,), threshold))
    unit = torch.nn.functional.normalize(x, dim=-1)
    near = (unit @ unit.mT).tolist()
    for i in range(2):
        want, picks = order_slowly(near[i], group[i].tolist(), score[i].tolist(), threshold)
        assert order[i].tolist() == want
        assert set(pick[i].nonzero()[:, 0].tolist()) == picks


def shares_slowly(size: list[int], picks: list[int], total: int, budget: int) -> list[int]:
    """Step by step, with exact fractions."""
    low = [min(1, c) for c in size]
    high = [min(5 * -(-total // 64), c, n) for c, n in zip(size, picks)]
    while sum(high) < total and high != size:
        high = [min(u + 1, c) for u, c in zip(high, size)]
    spare, share, last, running = max(0, budget - sum(low)), [], 0, 0
    for i, own in enumerate(picks):
        running += own
        end = round(Fraction(spare * running, sum(picks)))  # halves to even
        share.append(min(end - last + low[i], high[i]))
        last = end
    for i in sorted(range(len(size)), key=lambda i: -picks[i]):
        share[i] += min(high[i] - share[i], max(0, spare + sum(low) - sum(share)))
    return share


@few
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), st.data())
def test_shares_equal_the_slow_twin(size: list[int], data: st.DataObject) -> None:
    picks = [data.draw(st.integers(min(1, c), c)) for c in size]
    total = data.draw(st.integers(1, sum(size)))
    budget = total - data.draw(st.integers(0, 1))
    got = group_shares(torch.tensor([size]), torch.tensor([picks]), total, budget)[0].tolist()
    assert got == shares_slowly(size, picks, total, budget)
    assert sum(got) == max(budget, sum(c > 0 for c in size))


def test_exact_halves_round_to_even() -> None:
    """Two groups of two picks each share 1: half of it belongs to the first."""
    size = torch.tensor([[4, 4]])
    assert group_shares(size, torch.tensor([[2, 2]]), 3).tolist() == [[1, 2]]


@pytest.mark.parametrize("shape", [(3, 30, 8), (3, 12, 20)])
def test_components_are_those_of_the_singular_value_decomposition(shape: Any) -> None:
    x = normal(0, *shape)
    y = x.sigmoid().double()
    vectors = torch.linalg.svd(y - y.mean(-1, keepdim=True), full_matrices=False).U[..., :4].abs()
    group, loading = principal_groups(x, 4)
    assert torch.equal(group, vectors.argmax(-1))
    torch.testing.assert_close(loading, vectors.amax(-1).float())


def test_random_components_are_drawn_alike_for_every_image() -> None:
    x = normal(1, 3, 40, 16)
    all_at_once = principal_groups(x, 5, generator(7))[0]
    for i in range(3):
        assert torch.equal(principal_groups(x[i : i + 1], 5, generator(7))[0][0], all_at_once[i])
    assert not torch.equal(principal_groups(x, 5, generator(8))[0], all_at_once)


def test_mean_similarity_is_that_of_all_pairs() -> None:
    x = normal(2, 2, 9, 5)
    unit = torch.nn.functional.normalize(x, dim=-1)
    pairs = torch.triu_indices(9, 9, 1)
    want = (unit @ unit.mT)[:, pairs[0], pairs[1]].mean(-1)
    torch.testing.assert_close(mean_similarity(x), want)
    assert mean_similarity(x[:, :1]).tolist() == [0, 0]


def prefill(model: Any, inputs: dict[str, Tensor], method: PruneSID) -> Any:
    with torch.no_grad(), tokprune.compress(model, method) as trace:
        model(**inputs)
    return trace.last


def test_patches_of_crops_in_their_own_places_or_as_published() -> None:
    """Prompt columns of the tokens, in the order in which they enter the decoder."""
    model, text = llava_next(), 4
    inputs = make_inputs(model, [[text, "image", 6]], sizes=[(20, 40)])
    trace = prefill(model, inputs, PruneSID(keep=11))
    published = prefill(model, inputs, PruneSID(keep=11, crop_order="published"))
    own, moved = (x.layers[0].column[0].tolist() for x in (trace, published))
    record = trace.records[0]
    kept = record.history[-1][1][1:, -10:]  # in group order, behind the class token
    ordered = kept.sort(-1).values
    assert not torch.equal(kept, ordered)
    places = [raster_pack(k, record.layout.tile_grid, GRID, 0).tolist() for k in (kept, ordered)]
    start, stop = text + 11, text + 11 + 20
    column = dict(zip(map(tuple, places[0]), own[start:stop]))
    assert moved[start:stop] == [column[tuple(at)] for at in places[1]] != own[start:stop]
    assert moved[:start] + moved[stop:] == own[:start] + own[stop:]
    shown = [c for c in own[start:stop] if c > text]  # padding has no column of its own
    assert shown == sorted(shown)


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 35])
def test_every_budget_holds_the_class_token(keep: int) -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6]])
    for options in ({}, {"keep_cls": False}, {"pca": "random", "seed": 3}):
        trace = prefill(model, inputs, PruneSID(keep=keep, **options))
        assert trace.layers[0].counts == [[keep]]
        own = trace.records[0].cell.tolist()
        assert own.count(-1) == int("keep_cls" not in options)
        assert len(set(own)) == keep


def test_only_random_components_depend_on_the_seed() -> None:
    assert not PruneSID(keep=9).stochastic
    assert PruneSID(keep=9, pca="random").stochastic
