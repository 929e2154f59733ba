"""Greedy coverage (SCOPE): one program per set of tokens makes all picks, and looks again only at
tokens whose score can still be the best.

A token's gain only falls while others are picked, and so does its computed gain: float addition and
maximum are monotone and each gain is summed in one fixed order. An old score is therefore an upper
bound of the new one, exactly (lazy evaluation: Minoux 1978, "Accelerated greedy algorithms for
maximizing submodular set functions"). Tokens are kept in tiles, with one bound per tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokprune.operators.kernels.door import on_device, options
from tokprune.operators.kernels.greedy import as_bytes
from tokprune.operators.kernels.ordered import index_of, pack, power_of_two

__all__ = ["coverage_picks"]

#: tokens of a tile, and columns of the similarities that are read at once
TILE, COLUMNS = 16, 512


@triton.jit
def best_of_tile(
    matrix, covered, weight, closed, tile, n,
    MULTIPLY: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The best score now among the tokens of a tile, packed with its token."""
    token = tile * TILE + tl.arange(0, TILE)
    real = token < n
    total = tl.zeros((TILE, COLUMNS), tl.float32)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < n
        there = real[:, None] & inside[None, :]
        similar = tl.load(matrix + token[:, None].to(tl.int64) * n + column[None, :], mask=there,
                          other=0.0)  # fmt: skip
        so_far = tl.load(covered + column, mask=inside, other=0.0)
        more = similar - so_far[None, :]
        total += tl.where(more < 0, 0.0, more)  # NaN stays
    gain = tl.sum(total, 1)
    factor = tl.load(weight + token, mask=real, other=0.0)
    score = gain * factor if MULTIPLY else gain + factor
    free = real & (tl.load(closed + token, mask=real, other=1) == 0)
    return tl.max(pack(tl.where(free, score, float("-inf")), token), 0)


@triton.jit(do_not_specialize=["k"])
def coverage_kernel(
    matrix, weight, covered, closed, order, n, k,
    MULTIPLY: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    matrix += b * n * n
    weight += b * n
    covered += b * n
    closed += b * n
    lowest = tl.full((), -0x8000000000000000, tl.int64)
    tiles = tl.arange(0, TILES)
    # no score is known yet: the bounds are above any, with the first token of each tile
    bound = pack(tl.full((TILES,), float("nan"), tl.float32), tiles * TILE)
    bound = tl.where(tiles * TILE < n, bound, lowest)
    for step in range(k):
        best = lowest
        top = tl.max(bound, 0)
        while top > best:
            tile = (index_of(top) // TILE).to(tl.int32)
            found = best_of_tile(matrix, covered, weight, closed, tile, n, MULTIPLY, TILE, COLUMNS)
            bound = tl.where(tiles == tile, found, bound)
            best = tl.maximum(best, found)
            top = tl.max(bound, 0)
        pick = index_of(best)
        tl.store(order + b * k + step, pick)
        tl.store(closed + pick, 1)
        for start in range(0, n, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < n
            similar = tl.load(matrix + pick * n + column, mask=inside, other=0.0)
            so_far = tl.load(covered + column, mask=inside, other=0.0)
            more = (similar > so_far) | (similar != similar)
            tl.store(covered + column, tl.where(more, similar, so_far), mask=inside)
        tl.debug_barrier()  # the tiles read what other threads wrote just now


def coverage_picks(
    matrix: Tensor, weight: Tensor, k: int, candidates: Tensor | None, *, multiply: bool
) -> Tensor:
    """Picks [B, k] long.

    Args:
        matrix: [B, n, n] float32 contiguous cosines, n ≤ ``LONGEST_ROW``.
        weight: [B, n] float32 w^α, at least 0.
        k: picks.
        candidates: [B, n] bool, or None.
        multiply: score gain · weight; otherwise gain + weight.
    """
    batch, n = weight.shape
    order = torch.empty(batch, k, dtype=torch.long, device=matrix.device)
    covered = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    closed = torch.zeros_like(covered, dtype=torch.bool)
    if candidates is not None:
        closed = ~candidates
        covered.masked_fill_(closed, torch.inf)
    with on_device(matrix):
        coverage_kernel[(batch,)](
            matrix, weight.contiguous(), covered, as_bytes(closed, order), order, n, k,
            MULTIPLY=multiply, TILES=power_of_two(triton.cdiv(n, TILE)),
            TILE=TILE, COLUMNS=COLUMNS, **options(16),
        )  # fmt: skip
    return order
