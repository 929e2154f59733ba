"""HoloV beyond its golden cases: what goes over is given to others, and the number of crops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokprune.methods import HoloV
from tokprune.operators.holov import crop_allocation, crop_runs, crop_scores, select_by_crops


def slow(features: torch.Tensor, attention: torch.Tensor, budget: int, crops: int) -> list[int]:
    """One image, token by token."""
    f, a = features.double().tolist(), attention.double().tolist()
    runs, start = [], 0
    for length in crop_runs(len(f), crops):
        runs.append(range(start, start + length))
        start += length
    scores = []
    for run in runs:
        if len(run) == 1:
            scores.append(a[run[0]])
            continue
        norms = {i: math.hypot(*f[i]) + 1e-6 for i in run}
        v = []
        for i in run:
            s = [
                0.0 if i == j else sum(x * y for x, y in zip(f[i], f[j])) / norms[i] / norms[j]
                for j in run
            ]
            mean = sum(s) / (len(run) - 1)
            v.append(sum((x - mean) ** 2 for x in s) / (len(run) - 1))
        own = [1000 * a[i] for i in run]
        gamma = sum(own) / (sum(v) + 1e-6 * len(run))
        scores.append(sum(x + 0.09 * gamma * y for x, y in zip(own, v)) / len(run))
    total = sum(scores) + 1e-6
    falling = sorted(range(len(runs)), key=lambda c: -scores[c])
    number = [math.floor(score / total * budget) for score in scores]
    for c in falling[: budget - sum(number)]:
        number[c] += 1
    number = [min(n, len(run)) for n, run in zip(number, runs)]
    for c in falling:
        number[c] += min(len(runs[c]) - number[c], budget - sum(number))
    kept = []
    for run, n in zip(runs, number):
        best = sorted(run, key=lambda i: -a[i])[:n]
        kept += sorted(best) if n == len(run) else best
    return kept


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 45), st.floats(0, 1), st.floats(0.5, 6), st.integers(0, 99)
)
def test_equals_the_same_token_by_token(
    tokens: int, crops: int, share: float, peak: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(2, tokens, 5, generator=random)
    attention = (peak * torch.randn(2, tokens, generator=random)).softmax(-1)
    budget = max(1, int(share * tokens))
    got = select_by_crops(features, attention, budget, crops)
    want = [slow(f, a, budget, crops) for f, a in zip(features, attention)]
    assert got.tolist() == want


def test_a_crop_gives_what_it_cannot_hold_to_the_others() -> None:
    features = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0))
    attention = torch.full((1, 12), 0.01)
    attention[0, 4:8] = 0.2  # the second of three crops
    attention[0, 8:] = 0.02
    wanted = crop_allocation(crop_scores(features, attention, 3), 9)
    assert wanted[0, 1] > 4
    assert select_by_crops(features, attention, 9, 3)[0].tolist() == [0, *range(4, 12)]
    padded = select_by_crops(features, attention, 9, 3, overflow="pad")[0].tolist()
    assert padded[-1] == -1
    assert len(padded) == 9


@pytest.mark.parametrize(("keep", "crops"), [(64, 16), (128, 8), (192, 5), (32, 32), (576, 1)])
def test_crops_follow_the_budget(keep: int, crops: int) -> None:
    assert HoloV(keep=keep).runs(576, keep) == crops
    assert HoloV(keep=keep, crops=3).runs(576, keep) == 3


def test_bad_arguments_are_named() -> None:
    x, a = torch.zeros(1, 4, 2), torch.zeros(1, 4)
    with pytest.raises(ValueError, match="budget is 5; it should be between 1"):
        select_by_crops(x, a, 5, 2)
    with pytest.raises(ValueError, match="attention has shape"):
        crop_scores(x, a[:, :3], 2)
    with pytest.raises(ValueError, match="overflow='none' is unknown"):
        select_by_crops(x, a, 2, 2, overflow="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="crops=0 should be a whole number, at least 1"):
        HoloV(keep=4, crops=0)
