"""Operators of rectified attention against loops in float64, and copies of keys."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from tokprune.operators import anchors as own
from tokprune.operators.anchors import clusters_around, distinctive_anchors, nearest
from tokprune.operators.attention import attention_rows
from tokprune.operators.rectified import distance_bias, extended, recycled_weight


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ biases


def test_a_key_of_three_is_three_copies() -> None:
    q, k, v = random(2, 4, 5, 16), random(2, 2, 6, 16, seed=1), random(2, 2, 6, 12, seed=2)
    times = torch.tensor([[1, 3, 1, 2, 5, 1], [1, 1, 1, 4, 1, 1]])
    got = extended(q, k, v, times.log(), 0.3)
    out = scaled_dot_product_attention(*got, scale=0.3, enable_gqa=True)
    for row in range(2):
        copies = [x[row : row + 1].repeat_interleave(times[row], 2) for x in (k, v)]
        want = scaled_dot_product_attention(q[row : row + 1], *copies, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(out[row : row + 1, ..., :12], want, atol=1e-6, rtol=1e-5)
    assert not out[..., 12:].any()
    assert all(x.shape[-1] % 8 == 0 for x in got[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_nothing_of_the_bias(dtype: torch.dtype) -> None:
    size = torch.arange(1, 300).float()
    q, k = torch.zeros(1, 1, 1, 128, dtype=dtype), torch.zeros(1, 1, 299, 128, dtype=dtype)
    got = extended(q, k, k, size.log()[None], 128**-0.5)
    assert {x.dtype for x in got} == {dtype}
    logits = (got.query.double() @ got.key.double().transpose(-1, -2))[0, 0, 0] * 128**-0.5
    error = (logits - size.double().log()).abs().max()
    one = got.key[0, 0, :, 128].double() * 128**-0.5 - size.double().log()
    assert error < 1e-4 < one.abs().max()


def test_extended_wants_a_number_per_key() -> None:
    q = random(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"bias has shape \(1, 4\); it should be \[1, 3\]"):
        extended(q, q, q, torch.zeros(1, 4), 1.0)


def test_rows_of_attention_take_a_bias() -> None:
    q, k, bias = random(1, 4, 3, 8), random(1, 2, 7, 8, seed=1), random(1, 3, 7, seed=2)
    got = attention_rows(q, k, 0.5, bias=bias)
    heads = k.repeat_interleave(2, 1)
    want = (q @ heads.transpose(-1, -2) * 0.5 + bias[:, None]).softmax(-1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_distances_of_scaled_tables(factor: float) -> None:
    theta = 100.0 ** (-torch.arange(6) / 6)
    position = torch.tensor([0, 3, 4, 9, 500])
    angles = (position[:, None] * theta).double()
    table = tuple((factor * f(angles)).float().repeat(1, 2) for f in (torch.cos, torch.sin))
    got = distance_bias(table, table, 1.5)
    for i, m in enumerate(position.tolist()):
        for j, n in enumerate(position.tolist()):
            mean = sum(math.cos((m - n) * t) for t in theta.tolist()) / 6
            assert got[i, j].item() == pytest.approx(math.log(1.5 - mean), abs=2e-4)


def test_a_constant_that_distance_reaches() -> None:
    table = (torch.ones(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"c=1\.0 should be above 1"):
        distance_bias(table, table, 1.0)


# ------------------------------------------------------------------ clusters


def test_nearest_by_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_BLOCK", 7)
    x = random(2, 20, 5)
    kept = torch.tensor([[2, 5, 19, -1], [0, 3, 4, 11]])
    segment = torch.tensor([[0] * 10 + [1] * 5 + [2] * 5, [0] * 20])
    got = nearest(x, kept, segment)
    unit = normalize(x.double(), dim=-1)
    for row in range(2):
        members = [(n, k) for n, k in enumerate(kept[row].tolist()) if k >= 0]
        for token in range(20):
            may = [(n, k) for n, k in members if segment[row, k] == segment[row, token]]
            want = -1
            if may:
                want = max(may, key=lambda nk: float(unit[row, token] @ unit[row, nk[1]]))[0]
            assert got[row, token] == want, (row, token)


def test_equals_join_the_first_and_the_kept_join_themselves() -> None:
    x = torch.ones(6, 3)
    assert nearest(x, torch.tensor([1, 4])).tolist() == [0, 0, 0, 0, 1, 0]
    with pytest.raises(ValueError, match="kept has shape"):
        nearest(x, torch.tensor([[1]]))


def brute(x: Tensor, k: int, superior: str) -> list[int]:
    unit = normalize(x.double(), dim=-1)
    same = unit @ unit.T
    density = same.sum(1)
    score = []
    for i in range(len(x)):
        below = density < density[i] if superior == "lower" else density > density[i]
        likeness = same[i][below].max() if below.any() else 0.0
        score.append(float(density[i] * (1 - likeness)))
    return sorted(sorted(range(len(x)), key=lambda i: -score[i])[:k])


@pytest.mark.parametrize("superior", ["lower", "higher"])
def test_anchors_by_a_loop(superior: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_BLOCK", 16)
    x = random(3, 50, 8, seed=4) + 0.4
    got = distinctive_anchors(x, 9, superior)
    for row in range(3):
        assert got.anchors[row].tolist() == brute(x[row], 9, superior)
        for number in range(9):
            members = x[row][got.cluster[row] == number]
            torch.testing.assert_close(got.merged[row, number], members.mean(0))
            assert got.size[row, number] == len(members)
    assert got.size.sum(-1).tolist() == [50] * 3


def test_anchors_of_zeros_and_of_all() -> None:
    x = torch.cat([torch.zeros(2, 4), random(3, 4)])
    got = distinctive_anchors(x, 5)
    assert got.anchors.tolist() == [0, 1, 2, 3, 4] == got.cluster.tolist()
    assert torch.equal(got.merged, x)
    with pytest.raises(ValueError, match="k is 6"):
        distinctive_anchors(x, 6)
    with pytest.raises(ValueError, match="superior='least' is unknown"):
        distinctive_anchors(x, 2, "least")  # type: ignore[arg-type]


def test_places_of_clusters() -> None:
    x = torch.eye(3)[torch.tensor([0, 1, 0, 0, 1, 2, 0])]
    got = clusters_around(x, torch.tensor([0, 4, 5]))
    assert got.cluster.tolist() == [0, 1, 0, 0, 1, 2, 0]
    assert got.place("first").tolist() == [0, 1, 5]
    assert got.place("median").tolist() == [2, 1, 5]  # lower
    assert got.place("last").tolist() == [6, 4, 5]


def test_weights_of_what_joined() -> None:
    cluster, anchors = torch.tensor([0, 1, 0, -1, 1]), torch.tensor([0, 4])
    assert recycled_weight(cluster, anchors).tolist() == [2, 2]
    weight = torch.tensor([0.5, 0.25, 0.75, 9.0, 7.0])
    assert recycled_weight(cluster, anchors, weight).tolist() == [1.75, 1.25]
