"""The best neighbour of each row: maximum and argmax of A·Bᵀ, which is never written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokprune.operators.kernels.door import on_device, options
from tokprune.operators.kernels.ordered import index_of, pack, value_of

__all__ = ["best_neighbour"]

#: rows of A and of B in a block, and features multiplied at once
ROWS, COLUMNS, DEPTH = 64, 64, 16


@triton.jit
def match_kernel(
    a, b, best, slot, n, m, width, barred, a_batch, a_row, b_batch, b_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One block of rows of A against all of B; products in full float32, never TF32."""
    image = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * ROWS
    local, beside = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row = start + local
    # where a block starts may need 64 bits; what lies inside it does not
    a += image * a_batch + start.to(tl.int64) * a_row
    b += image * b_batch
    key = tl.full((ROWS,), -0x8000000000000000, tl.int64)
    for first_column in range(0, m, COLUMNS):
        column = first_column + beside
        other = b + tl.full((), first_column, tl.int64) * b_row
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, width, DEPTH):
            part = first + tl.arange(0, DEPTH)
            inside = (row < n)[:, None] & (part < width)[None, :]
            left = tl.load(a + local[:, None] * a_row + part[None, :], mask=inside, other=0.0)
            inside = (part < width)[:, None] & (column < m)[None, :]
            right = tl.load(other + part[:, None] + beside[None, :] * b_row, mask=inside, other=0.0)
            product = tl.dot(left, right, product, input_precision="ieee")
        open_ = (column >= barred) & (column < m)
        product = tl.where(open_[None, :], product, float("-inf"))
        key = tl.maximum(key, tl.max(pack(product, column[None, :]), 1))
    place = image * n + row
    tl.store(best + place, value_of(key), mask=row < n)
    tl.store(slot + place, index_of(key), mask=row < n)


def best_neighbour(a: Tensor, b: Tensor, barred: int = 0) -> tuple[Tensor, Tensor]:
    """The largest product [B, n] float32 of each row of A with a row of B, and which [B, n] long.

    Args:
        a, b: [B, n, C] and [B, m, C] float32, m ≥ 1, each row in one piece.
        barred: so many rows of ``b``, from the first, count as −inf.
    """
    batch, n, width = a.shape
    best = a.new_empty(batch, n)
    slot = torch.empty(batch, n, dtype=torch.long, device=a.device)
    if a.stride(2) != 1:
        a = a.contiguous()
    if b.stride(2) != 1:
        b = b.contiguous()
    with on_device(a):
        match_kernel[(triton.cdiv(n, ROWS), batch)](
            a, b, best, slot, n, b.shape[1], width, barred,
            a.stride(0), a.stride(1), b.stride(0), b.stride(1),
            ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, **options(8),
        )  # fmt: skip
    return best, slot
