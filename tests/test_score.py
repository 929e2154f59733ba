"""SCoRe's choice: a slow twin, its two ends, patches of no salience."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_tensors import few, generator, normal, seeds
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.methods import SCoRe
from tokprune.operators.diversity import k_center
from tokprune.operators.score import salient_k_center


def slowly(x: Tensor, w: Tensor, k: int, alpha: float, candidates: list[int]) -> list[int]:
    """One set, token by token, in float64."""
    unit = normalize(x.double(), dim=-1)
    distance, weight = 1 - unit @ unit.T, w.double() ** alpha
    chosen = [max(candidates, key=lambda i: float(w[i]))]
    while len(chosen) < k:
        chosen.append(
            max(
                (i for i in candidates if i not in chosen),
                key=lambda i: min(float(distance[i, c]) for c in chosen) * float(weight[i]),
            )
        )
    return chosen


@few
@given(seeds, st.integers(2, 24), st.sampled_from([0.0, 0.3, 0.8, 3.0]), st.data())
def test_choice_equals_the_slow_twin(seed: int, n: int, alpha: float, data: st.DataObject) -> None:
    x, w = normal(seed, 2, n, 6), normal(seed + 1, 2, n).mul(2).softmax(-1)
    allowed = torch.rand(2, n, generator=generator(seed)) < 0.7
    allowed[:, data.draw(st.integers(0, n - 1))] = True
    k = data.draw(st.integers(1, int(allowed.sum(1).min())))
    noise = x.masked_fill(~allowed[..., None], 7.0), w.masked_fill(~allowed, 1.0)
    got = salient_k_center(*noise, k, alpha, allowed)
    for i in range(2):
        own = allowed[i].nonzero()[:, 0].tolist()
        assert got[i].tolist() == slowly(x[i], w[i], k, alpha, own)
    assert torch.equal(salient_k_center(noise[0][1], noise[1][1], k, alpha, allowed[1]), got[1])


def test_the_exponent_goes_from_farthest_first_to_the_most_salient() -> None:
    x, w = normal(3, 1, 40, 8), normal(4, 1, 40).mul(3).softmax(-1) * 1e-6
    assert torch.equal(salient_k_center(x, w, 12, 0.0), k_center(x, 12, w.argmax(-1)))
    assert torch.equal(salient_k_center(x, w, 5, 20.0), w.argsort(descending=True)[:, :5])


def test_patches_of_no_salience_come_last() -> None:
    """Though they are the farthest; of equals the first."""
    x, w = torch.eye(6)[None], torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.2, 0.1]])
    assert salient_k_center(x, w, 6).tolist() == [[3, 1, 4, 5, 0, 2]]
    assert salient_k_center(x, w, 6, 0.0).tolist() == [[3, 0, 1, 2, 4, 5]]


def test_numbers_out_of_range_are_named() -> None:
    x = torch.zeros(1, 6, 4)
    with pytest.raises(ValueError, match="alpha is -1; it should be at least 0"):
        salient_k_center(x, x[..., 0], 2, -1)
    with pytest.raises(ValueError, match=r"saliency has shape \(1, 5\); it should be \(1, 6\)"):
        salient_k_center(x, x[:, 1:, 0], 2)
    with pytest.raises(ValueError, match=r"alpha=-1 should be in \[0, inf\]"):
        SCoRe(keep=4, alpha=-1)
