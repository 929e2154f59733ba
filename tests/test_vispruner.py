"""VisPruner's removal of duplicates: a slow twin, budgets at which the official code stops, and
errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_tensors import few, normal, seeds
from torch import Tensor

from tokprune.operators.vispruner import drop_duplicates, important_and_diverse


def slowly(x: Tensor, order: list[int], keep: int, per_round: int) -> list[int]:
    """One image, pair by pair, in float64."""
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    while len(order) > keep:
        first, second = order[0::2], order[1::2]
        nearest = {a: max(float(unit[a] @ unit[b]) for b in second) for a in first}
        first = sorted(first, key=lambda a: -nearest[a])
        order = first[min(per_round, len(order) - keep, len(first)) :] + second
    return order


@few
@given(seeds, st.integers(1, 40), st.data())
def test_rounds_of_any_length_equal_the_slow_twin(seed: int, n: int, data: st.DataObject) -> None:
    """Odd lists, and rounds of more than a side has, included."""
    keep, per_round = data.draw(st.integers(0, n)), data.draw(st.integers(1, 9))
    x = normal(seed, 2, 45, 7)
    order = torch.stack([normal(seed + i + 1, 45).argsort()[:n] for i in range(2)])
    got = drop_duplicates(x, order, keep, per_round)
    assert got.shape == (2, keep)
    if keep:
        for i in range(2):
            assert got[i].tolist() == slowly(x[i], order[i].tolist(), keep, per_round)


@pytest.mark.parametrize("keep", [58, 4, 1, 2, 576])
def test_every_budget_gives_as_many_different_tokens(keep: int) -> None:
    x, score = normal(0, 1, 576, 8), normal(1, 1, 576)
    important, diverse = important_and_diverse(x, score, keep)
    assert important.shape[1] == keep // 2
    assert len(set(torch.cat([important, diverse], 1)[0].tolist())) == keep


def test_long_lists_are_compared_without_all_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    x, order = normal(3, 2, 50, 6), normal(4, 2, 50).argsort(-1)
    want = drop_duplicates(x, order, 11)
    monkeypatch.setattr("tokprune.operators.vispruner.DENSE_LIMIT", 10)
    assert torch.equal(drop_duplicates(x, order, 11), want)


def test_of_exact_copies_the_one_listed_first_goes() -> None:
    x = torch.eye(4)[None][:, [0, 1, 2, 2, 1, 3]]
    assert drop_duplicates(x, torch.tensor([[2, 3, 4, 1, 0, 5]]), 4, 1).tolist() == [[3, 5, 0, 1]]


def test_numbers_out_of_range_are_named() -> None:
    x, order = normal(0, 1, 6, 3), torch.arange(6)[None]
    with pytest.raises(ValueError, match="keep is 7; it should be between 0 and the 6 tokens"):
        drop_duplicates(x, order, 7)
    with pytest.raises(ValueError, match="per_round is 0"):
        drop_duplicates(x, order, 3, 0)
    with pytest.raises(ValueError, match=r"important_ratio is 1.5; it should be in \[0, 1\]"):
        important_and_diverse(x, normal(1, 1, 6), 3, 1.5)
