"""Greedy MAP of a determinantal point process: one program per set of tokens makes all picks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokprune.operators.kernels.door import on_device, options
from tokprune.operators.kernels.greedy import as_bytes, warps
from tokprune.operators.kernels.ordered import index_of, pack, power_of_two, value_of

__all__ = ["dpp_picks"]


@triton.jit(do_not_specialize=["k"])
def dpp_kernel(
    kernel, candidates, factor, order, n, k, tiny,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Step t reads one row of the kernel and the t rows of the factor that are there so far,
    ``DEPTH`` at a time so that their loads overlap."""
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < n
    matrix = kernel + b * n * n
    rows = factor + b * (k - 1) * n
    allowed = real
    if MASKED:
        allowed = tl.load(candidates + b * n + at, mask=real, other=0) != 0
    gain = tl.load(matrix + at.to(tl.int64) * (n + 1), mask=real, other=0.0)
    gain = tl.where(allowed, gain, float("-inf"))
    for t in range(k - 1):
        key = tl.max(pack(gain, at), 0)
        pick = index_of(key)
        tl.store(order + b * k + t, pick)
        left = value_of(key)
        done = tl.zeros((DEPTH, BLOCK), tl.float32)
        for s in range(0, t, DEPTH):
            row = s + tl.arange(0, DEPTH)
            own = tl.load(rows + row * n + pick, mask=row < t, other=0.0)
            there = (row < t)[:, None] & real[None, :]
            part = tl.load(rows + row[:, None] * n + at[None, :], mask=there, other=0.0)
            done += own[:, None] * part
        # a gain that is used up appends nothing
        scale = tl.where(left > tiny, 1.0 / tl.sqrt(tl.where(left > tiny, left, 1.0)), 0.0)
        new = tl.load(matrix + pick * n + at, mask=real, other=0.0) - tl.sum(done, 0)
        new = new * scale
        tl.store(rows + t * n + at, new, mask=real)
        gain = tl.where(at == pick, float("-inf"), gain - new * new)
        tl.debug_barrier()  # the next step reads entries of this row that other threads wrote
    tl.store(order + b * k + k - 1, index_of(tl.max(pack(gain, at), 0)))


def dpp_picks(kernel: Tensor, k: int, candidates: Tensor | None) -> Tensor:
    """Picks [B, k] long of ``kernel`` [B, n, n] float32 contiguous, n ≤ ``LONGEST_ROW``.

    ``candidates`` [*, n] bool of B rows, or None. Holds the factor [B, k − 1, n].
    """
    batch, n = kernel.shape[:2]
    order = torch.empty(batch, k, dtype=torch.long, device=kernel.device)
    factor = kernel.new_empty(batch, k - 1, n)
    block = power_of_two(n)
    with on_device(kernel):
        dpp_kernel[(batch,)](
            kernel, as_bytes(candidates, order), factor, order, n, k,
            torch.finfo(torch.float32).tiny,
            MASKED=candidates is not None, BLOCK=block, DEPTH=depth(block),
            **options(warps(block)),
        )  # fmt: skip
    return order


def depth(block: int) -> int:
    """Rows of the factor read at once: as many as make 8192 floats with rows of ``block``."""
    return max(1, min(16, 8192 // block))
