"""Properties of greedy coverage, of the attention that keys receive, and of gathered rows."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_tensors import few, generator, normal, seeds
from torch import Tensor

from tokprune.operators import attention_rows, coverage_select, received_attention
from tokprune.operators.rows import gather_rows

# ---------------------------------------------------------------------------------- coverage


def gains(x: Tensor, chosen: list[int], counted: Tensor) -> Tensor:
    """What each token would add to what is covered so far, afresh and in float64."""
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    similar = unit @ unit.T
    covered = torch.zeros(len(x), dtype=torch.double)
    for c in chosen:
        covered = torch.maximum(covered, similar[:, c])
    return (similar - covered[:, None]).clamp(min=0)[counted].sum(0)


@few
@given(seeds, st.integers(2, 25), st.sampled_from([0.0, 0.5, 1.0, 1.5]), st.booleans(), st.data())
def test_coverage_takes_the_best_score_at_each_step(
    seed: int, n: int, alpha: float, multiply: bool, data: st.DataObject
) -> None:
    x, saliency = normal(seed, n, 6), torch.rand(n, generator=generator(seed))
    allowed = torch.rand(n, generator=generator(seed + 1)) < 0.8
    allowed[n // 2] = True
    k = data.draw(st.integers(1, int(allowed.sum())))
    combine: Any = "multi" if multiply else "add"
    order = coverage_select(x, k, saliency, alpha, combine, allowed).tolist()
    weight = saliency.double() ** alpha
    for step, pick in enumerate(order):
        gain = gains(x, order[:step], allowed)
        score = gain * weight if multiply else gain + weight
        score[~allowed] = -torch.inf
        score[order[:step]] = -torch.inf
        assert score[pick] >= score.max() - 1e-5
        assert torch.isfinite(score[pick])


@few
@given(seeds, st.integers(1, 30))
def test_coverage_nests_and_sets_of_a_batch_are_alone(seed: int, n: int) -> None:
    x, saliency = normal(seed, 2, 3, n, 8), torch.rand(2, 3, n, generator=generator(seed))
    whole = coverage_select(x, n, saliency)
    assert whole.shape == (2, 3, n)
    assert torch.equal(whole.sort(-1).values, torch.arange(n).expand(2, 3, n))
    k = (n + 1) // 2
    assert torch.equal(coverage_select(x, k, saliency), whole[..., :k])
    assert torch.equal(coverage_select(x[1, 2], k, saliency[1, 2]), whole[1, 2, :k])


def test_coverage_of_copies_comes_last_in_position_order() -> None:
    x = torch.eye(4)[torch.tensor([2, 0, 2, 1, 0, 3])]
    assert coverage_select(x, 6).tolist() == [0, 1, 3, 5, 2, 4]


def test_coverage_ignores_what_others_hold_and_zero_rows() -> None:
    x, allowed = normal(3, 2, 12, 5), torch.ones(2, 12, dtype=torch.bool)
    allowed[:, [0, 7]] = False
    want = coverage_select(x[:, allowed[0]], 6)
    x[:, 0], x[:, 7] = torch.nan, torch.inf
    got = coverage_select(x, 6, candidates=allowed)
    place = allowed[0].nonzero()[:, 0]
    assert torch.equal(got, place[want])
    x = normal(4, 6, 5)
    x[2] = 0
    assert coverage_select(x, 6)[-1] == 2  # covers nothing


def test_coverage_of_long_sets_makes_rows_in_parts() -> None:
    x, saliency = normal(5, 2, 150, 16), torch.rand(2, 150, generator=generator(5))
    want = coverage_select(x, 20, saliency)
    module = import_module("tokprune.operators.coverage")
    with patch.object(module, "DENSE_LIMIT", 100), patch.object(module, "_CHUNK", 64):
        assert torch.equal(coverage_select(x, 20, saliency), want)
    with patch.object(module, "_CHUNK", 64):
        assert torch.equal(coverage_select(x, 20, saliency), want)


# ------------------------------------------------------------------------- attention received


@few
@given(seeds, st.integers(1, 20), st.booleans(), st.booleans(), st.data())
def test_received_is_the_mean_of_the_map(
    seed: int, keys: int, causal: bool, others_only: bool, data: st.DataObject
) -> None:
    rows = data.draw(st.integers(1, keys))
    q, k = normal(seed, 2, 4, rows, 8), normal(seed + 1, 2, 2, keys, 8)
    place = torch.randint(keys, (2, rows), generator=generator(seed))
    key_valid = torch.rand(2, keys, generator=generator(seed)) < 0.7
    row_valid = torch.rand(2, rows, generator=generator(seed + 1)) < 0.7
    got = received_attention(
        q, k, 0.4, causal=causal, place=place, key_valid=key_valid, row_valid=row_valid,
        softcap=3.0, others_only=others_only, block=data.draw(st.integers(1, 25)),
    )  # fmt: skip
    for b in range(2):
        total, number = torch.zeros(keys), 0
        for r in range(rows):
            if not row_valid[b, r]:
                continue
            own = int(place[b, r])
            see = key_valid[b] & (torch.arange(keys) <= (own if causal else keys))
            row = attention_rows(q[b, :, r : r + 1], k[b], 0.4, see[None], 3.0).mean(0)[0]
            if others_only:
                row[own] = 0
            total, number = total + row, number + 1
        torch.testing.assert_close(got[b], total / max(1, number - others_only))


def test_received_places_rows_at_the_last_keys() -> None:
    q, k = normal(0, 1, 2, 5, 8), normal(1, 1, 2, 9, 8)
    place = torch.arange(4, 9)[None]
    assert torch.equal(
        received_attention(q, k, causal=True), received_attention(q, k, causal=True, place=place)
    )
    assert received_attention(q, k).sum().item() == pytest.approx(1)


def test_received_can_be_trained_through() -> None:
    q, k = normal(0, 1, 2, 5, 8).requires_grad_(), normal(1, 1, 2, 5, 8)
    received_attention(q, k)[0, 1].backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------- gather


def test_gathered_rows_of_tensors_of_any_width() -> None:
    index = torch.tensor([[3, -1, 0], [1, 1, -1]])
    x, ids, table = normal(0, 2, 5, 7).bfloat16(), torch.arange(10).view(2, 5), normal(1, 1, 5, 2)
    got = gather_rows([x, ids, table.expand(2, -1, -1)], index)
    for b in range(2):
        for at, place in enumerate(index[b].clamp(min=0).tolist()):
            assert torch.equal(got[0][b, at], x[b, place])
            assert got[1][b, at] == ids[b, place]
            assert torch.equal(got[2][b, at], table[0, place])
    assert [y.dtype for y in got] == [torch.bfloat16, torch.int64, torch.float32]
    assert gather_rows([], index) == ()


# ---------------------------------------------------------------------------------- errors

X, Q = torch.ones(2, 5, 4), torch.ones(1, 2, 5, 4)
LONG = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coverage_select(X, 6), "k is 6"),
        (lambda: coverage_select(X, 2, alpha=-1.0), "alpha is -1.0"),
        (lambda: coverage_select(X, 2, alpha=float("nan")), "alpha is nan"),
        (lambda: coverage_select(X, 2, torch.ones(5)), "saliency has shape"),
        (lambda: coverage_select(X, 2, combine="max"), "combine='max'"),  # type: ignore[arg-type]
        (lambda: coverage_select(X, 2, candidates=torch.ones(2, 5)), "candidates is"),
        (lambda: received_attention(Q[0], Q), "q_rows has shape"),
        (lambda: received_attention(Q, Q[..., :3]), "k has shape"),
        (lambda: received_attention(Q, Q[:, :, :3]), "5 query rows with 3 keys"),
        (lambda: received_attention(Q, Q, place=LONG), "place is torch.int64"),
        (lambda: received_attention(Q, Q, key_valid=Q[0, :1] > 0), "key_valid is"),
        (lambda: received_attention(Q, Q, row_valid=Q[:, 0, :, 0]), "row_valid is"),
        (lambda: received_attention(Q, Q, block=0), "block is 0"),
        (lambda: gather_rows([X], LONG[0]), "index is torch.int64"),
        (lambda: gather_rows([X], LONG.int()), "index is torch.int32"),
        (lambda: gather_rows([X, X[:, :4]], LONG), r"tensors\[1\] has shape \(2, 4, 4\)"),
        (lambda: gather_rows([X[:1]], LONG), r"tensors\[0\] has shape \(1, 5, 4\)"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
