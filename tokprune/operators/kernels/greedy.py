"""k-center and max-sum from a ready matrix: one program per set of tokens makes all picks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokprune.operators.kernels.door import on_device, options
from tokprune.operators.kernels.ordered import index_of, pack, power_of_two, smaller

__all__ = ["as_bytes", "greedy_picks", "nearest_other", "warps"]


@triton.jit(do_not_specialize=["k"])
def picks_kernel(
    matrix, first, candidates, order, n, k,
    SUM: tl.constexpr, COSINE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All picks of one set: its state stays in registers, one row of the matrix is read a pick."""
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < n
    # entries past the end stay −inf: whatever is −inf in front of them has the lower index
    state = tl.where(real, 0.0 if SUM else float("inf"), float("-inf"))
    if MASKED:
        allowed = tl.load(candidates + b * n + at, mask=real, other=0) != 0
        state = tl.where(allowed, state, float("-inf"))
    pick = tl.load(first + b)
    tl.store(order + b * k, pick)
    for step in range(1, k):
        inside = tl.minimum(tl.maximum(pick, 0), n - 1)  # a pivot out of range reads no wild memory
        row = tl.load(matrix + (b * n + inside) * n + at, mask=real, other=0.0)
        if SUM:
            row = -row
        elif COSINE:
            row = 1.0 - row
        row = tl.where(at == pick, float("-inf"), row)
        state = state + row if SUM else smaller(state, row)
        pick = index_of(tl.max(pack(state, at), 0))
        tl.store(order + b * k + step, pick)


@triton.jit
def nearest_other_kernel(
    gram, candidates, out, n,
    MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Smallest cosine distance of some tokens to any other allowed one, down the columns."""
    b = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    nearest = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        counted = row < n
        if MASKED:
            counted = counted & (tl.load(candidates + b * n + row, mask=counted, other=0) != 0)
        counted = counted[:, None] & (column[None, :] < n) & (row[:, None] != column[None, :])
        place = gram + (b * n + row[:, None]) * n + column[None, :]
        distance = 1.0 - tl.load(place, mask=counted, other=0.0)
        nearest = smaller(nearest, tl.where(counted, distance, float("inf")))
    # the minimum of floats drops NaN, so that is found apart
    least = tl.min(tl.where(nearest == nearest, nearest, float("inf")), 0)
    least = tl.where(tl.max((nearest != nearest).to(tl.int32), 0) > 0, float("nan"), least)
    tl.store(out + b * n + column, least, mask=column < n)


def greedy_picks(
    matrix: Tensor, k: int, first: Tensor, candidates: Tensor | None, *,
    total: bool = False, cosine: bool = True,
) -> Tensor:  # fmt: skip
    """Picks [B, k] long: the token farthest from its nearest pick, or (``total``) in sum.

    Args:
        matrix: [B, n, n] float32 contiguous, n ≤ ``LONGEST_ROW``; cosines, or (not ``cosine``)
            distances, whose diagonal is ignored.
        k: picks, first included.
        first: [B] long.
        candidates: [*, n] bool of B rows, or None.
    """
    batch, n = matrix.shape[:2]
    order = torch.empty(batch, k, dtype=torch.long, device=matrix.device)
    first = first.reshape(-1).to(matrix.device).contiguous()
    block = power_of_two(n)
    with on_device(matrix):
        picks_kernel[(batch,)](
            matrix, first, as_bytes(candidates, first), order, n, k,
            SUM=total, COSINE=cosine, MASKED=candidates is not None, BLOCK=block,
            **options(warps(block)),
        )  # fmt: skip
    return order


def nearest_other(gram: Tensor, candidates: Tensor | None) -> Tensor:
    """Cosine distance [B, n] of each token to the nearest other one among ``candidates``.

    ``gram``: [B, n, n] float32 cosines, contiguous.
    """
    batch, n = gram.shape[:2]
    out = gram.new_empty(batch, n)
    with on_device(gram):
        nearest_other_kernel[(triton.cdiv(n, 32), batch)](
            gram, as_bytes(candidates, out), out, n,
            MASKED=candidates is not None, ROWS=64, COLUMNS=32, **options(4),
        )  # fmt: skip
    return out


def as_bytes(mask: Tensor | None, stand_in: Tensor) -> Tensor:
    """The mask as bytes in one piece; ``stand_in``, which is not read, where there is none."""
    return stand_in if mask is None else mask.to(stand_in.device).contiguous().view(torch.uint8)


def warps(block: int) -> int:
    """Warps of a program that holds a row of ``block`` floats."""
    return 4 if block <= 1024 else 8 if block <= 4096 else 16
