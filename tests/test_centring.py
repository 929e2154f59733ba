"""Centred geometry beside its definition, and as an option of methods."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_tensors import seeds
from torch import Tensor

import tokprune
from tokprune.operators.diversity import divprune, k_center
from tokprune.operators.geometry import centred_geometry


def plainly(x: Tensor, standardise: bool, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Centred similarities and distinctiveness of [n, d] as defined, whole matrices, float64."""
    y = x.double()
    if standardise:
        y = y / (y.var(0, correction=0) + eps).sqrt()
        y = y[:, (x != x[:1]).any(0)]
    apart = y - y.mean(0)
    cosine = torch.cosine_similarity(y[:, None], y[None], dim=-1, eps=1e-12)
    centred = torch.cosine_similarity(apart[:, None], apart[None], dim=-1, eps=1e-12)
    return centred, -(cosine.sum(1) - cosine.diagonal()) / max(1, len(x) - 1)


@given(seeds, st.integers(1, 12), st.integers(1, 6), st.booleans())
def test_as_defined(seed: int, n: int, d: int, standardise: bool) -> None:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 2
    x[:, 0] = 3.0  # a dimension that does not vary
    if d == 1 and standardise:
        return  # nothing is left
    centred, g = plainly(x, standardise)
    got = centred_geometry(x, standardise)
    torch.testing.assert_close(got.distinctiveness, g.float(), atol=2e-5, rtol=0)
    unit = torch.nn.functional.normalize(got.centred, dim=-1)
    if n > 1 and d > 1:
        torch.testing.assert_close(unit @ unit.T, centred.float(), atol=2e-4, rtol=0)
    assert got.weight.min() >= 0
    assert got.weight.max() <= 1


@given(seeds, st.booleans())
def test_rows_that_do_not_count_play_no_part(seed: int, standardise: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 9, 5, generator=g)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    x[1, 6:] = torch.nan
    both = centred_geometry(x, standardise, candidates=mask)
    alone = centred_geometry(x[1, :6], standardise)
    for got, want in zip(both, alone):
        torch.testing.assert_close(got[1, :6], want, atol=1e-5, rtol=0)


@given(seeds, st.booleans())
def test_weights_multiply_distances(seed: int, whole: bool) -> None:
    """Against the loop as it is worded; with and without the matrix of all pairs."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(14, 6, generator=g), torch.rand(14, generator=g)
    weight[3] = 0
    unit = torch.nn.functional.normalize(x, dim=-1)
    distance, chosen = 1 - unit @ unit.T, [5]
    for _ in range(7):
        value = weight * distance[:, chosen].amin(1)
        value[chosen] = -1
        chosen.append(int(value.argmax()))
    with pytest.MonkeyPatch.context() as patch:
        if not whole:
            patch.setattr("tokprune.operators.diversity.DENSE_LIMIT", 0)
        got = k_center(x, 8, torch.tensor(5), weight=weight)
        assert got.tolist() == chosen
        assert divprune(x, 14, weight=weight)[-1] == 3 or divprune(x, 1)[0] == 3
    with pytest.raises(ValueError, match="weight has shape"):
        k_center(x, 8, torch.tensor(5), weight=weight[:3])


@pytest.mark.parametrize("method", ["divprune", "cdpruner", "todre", "dart"])
def test_centre_is_checked(method: str) -> None:
    with pytest.raises(ValueError, match="centre='mean'"):
        tokprune.make_method(method, keep=3, centre="mean")
