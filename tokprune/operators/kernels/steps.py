"""Greedy selections from features, for sets so large that no N×N matrix is held.

One launch a pick, over all sets and blocks of tokens. Each program first takes the last pick from
the keys that all blocks left behind (two buffers in turn), makes the block's part of that token's
row from the features, updates its tokens and leaves the key of its best one.

Why not one persistent launch: its programs would have to wait for each other, which they cannot in
Triton's interpreter, so nothing could prove it without a GPU, and a program that waits for one that
is not resident hangs the device. Launches need no waiting, and a caller's CUDA graph captures them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokprune.operators.kernels.door import on_device, options
from tokprune.operators.kernels.ordered import index_of, pack, power_of_two, smaller, value_of

__all__ = ["dpp_steps", "greedy_steps"]

#: tokens of a block; features, and rows of the factor, that are read at once
TOKENS, FEATURES, DEPTH = 64, 64, 32


@triton.jit
def last_pick(keys, blocks, BLOCKS: tl.constexpr):
    """Key of the best token over all blocks."""
    at = tl.arange(0, BLOCKS)
    return tl.max(tl.load(keys + at, mask=at < blocks, other=-0x8000000000000000), 0)


@triton.jit
def row_part(rows, token, real, pick, width, TOKENS: tl.constexpr, FEATURES: tl.constexpr):
    """Products of the block's tokens with the one picked."""
    total = tl.zeros((TOKENS, FEATURES), tl.float32)
    for start in range(0, width, FEATURES):
        lane = start + tl.arange(0, FEATURES)
        wide = lane < width
        own = tl.load(rows + pick * width + lane, mask=wide, other=0.0)
        part = tl.load(rows + token[:, None].to(tl.int64) * width + lane[None, :],
                       mask=real[:, None] & wide[None, :], other=0.0)  # fmt: skip
        total += part * own[None, :]
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["k", "step"])
def greedy_step_kernel(
    rows, state, keys, next_keys, order, n, width, blocks, k, step,
    SUM: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Pick number ``step``, then the state of k-center or (SUM) max-sum after it."""
    block = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    pick = index_of(last_pick(keys + b * blocks, blocks, BLOCKS))
    if block == 0:
        tl.store(order + b * k + step, pick)
    if step < k - 1:
        token = block * TOKENS + tl.arange(0, TOKENS)
        real = token < n
        inside = tl.minimum(tl.maximum(pick, 0), n - 1)
        cosine = row_part(rows + b * n * width, token, real, inside, width, TOKENS, FEATURES)
        old = tl.load(state + b * n + token, mask=real, other=float("-inf"))
        row = tl.where(token == pick, float("-inf"), -cosine if SUM else 1.0 - cosine)
        new = old + row if SUM else smaller(old, row)
        tl.store(state + b * n + token, new, mask=real)
        tl.store(next_keys + b * blocks + block, tl.max(pack(new, token), 0))


@triton.jit(do_not_specialize=["k", "step"])
def dpp_step_kernel(
    rows, gain, factor, keys, next_keys, order, n, width, blocks, k, step, tiny,
    BLOCKS: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Pick number ``step``, its row of the factor, and the gains after it."""
    block = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    key = last_pick(keys + b * blocks, blocks, BLOCKS)
    pick = index_of(key)
    if block == 0:
        tl.store(order + b * k + step, pick)
    if step < k - 1:
        token = block * TOKENS + tl.arange(0, TOKENS)
        real = token < n
        new = row_part(rows + b * n * width, token, real, pick, width, TOKENS, FEATURES)
        done = tl.zeros((DEPTH, TOKENS), tl.float32)
        chosen = factor + b * (k - 1) * n
        for s in range(0, step, DEPTH):
            depth = (s + tl.arange(0, DEPTH)).to(tl.int64)
            there = depth < step
            own = tl.load(chosen + depth * n + pick, mask=there, other=0.0)
            part = tl.load(chosen + depth[:, None] * n + token[None, :],
                           mask=there[:, None] & real[None, :], other=0.0)  # fmt: skip
            done += own[:, None] * part
        left = value_of(key)
        scale = tl.where(left > tiny, 1.0 / tl.sqrt(tl.where(left > tiny, left, 1.0)), 0.0)
        new = (new - tl.sum(done, 0)) * scale
        place = (b * (k - 1) + step) * n + token
        tl.store(factor + place, new, mask=real)
        old = tl.load(gain + b * n + token, mask=real, other=float("-inf"))
        old = tl.where(token == pick, float("-inf"), old - new * new)
        tl.store(gain + b * n + token, old, mask=real)
        tl.store(next_keys + b * blocks + block, tl.max(pack(old, token), 0))


@triton.jit
def block_keys_kernel(state, keys, n, blocks, TOKENS: tl.constexpr):
    """Key of each block's best token."""
    block = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)
    value = tl.load(state + b * n + token, mask=token < n, other=float("-inf"))
    tl.store(keys + b * blocks + block, tl.max(pack(value, token), 0))


def greedy_steps(
    rows: Tensor, k: int, first: Tensor, candidates: Tensor | None, *, total: bool
) -> Tensor:
    """Picks [B, k] long: farthest from the nearest pick, or (``total``) in sum.

    Args:
        rows: [B, n, d] float32 unit rows.
        k: picks, first included.
        first: [B] long.
        candidates: [*, n] bool of B rows, or None.
    """
    batch, n, width = rows.shape
    rows = rows.contiguous()
    state = rows.new_full((batch, n), 0.0 if total else torch.inf)
    if candidates is not None:
        state.masked_fill_(~candidates.reshape(batch, n), -torch.inf)
    blocks = triton.cdiv(n, TOKENS)
    # a key of which only the index is read
    given = 0x7FFFFFFF - first.reshape(-1, 1).to(rows.device)
    now, then = given.repeat(1, blocks), given.repeat(1, blocks)
    order = torch.empty(batch, k, dtype=torch.long, device=rows.device)
    with on_device(rows):
        for step in range(k):
            greedy_step_kernel[(blocks, batch)](
                rows, state, now, then, order, n, width, blocks, k, step,
                SUM=total, BLOCKS=power_of_two(blocks), TOKENS=TOKENS, FEATURES=FEATURES,
                **options(4),
            )  # fmt: skip
            now, then = then, now
    return order


def dpp_steps(rows: Tensor, gain: Tensor, k: int, candidates: Tensor | None) -> Tensor:
    """Picks [B, k] long of the process with kernel L·Lᵀ.

    Args:
        rows: [B, n, d] float32, L.
        gain: [B, n] float32, the kernel's diagonal.
        k: picks.
        candidates: [*, n] bool of B rows, or None.
    """
    batch, n, width = rows.shape
    rows = rows.contiguous()
    state = gain.clone(memory_format=torch.contiguous_format)
    if candidates is not None:
        state.masked_fill_(~candidates.reshape(batch, n), -torch.inf)
    blocks = triton.cdiv(n, TOKENS)
    now = torch.empty(batch, blocks, dtype=torch.long, device=rows.device)
    then = torch.empty_like(now)
    factor = rows.new_empty(batch, k - 1, n)
    order = torch.empty(batch, k, dtype=torch.long, device=rows.device)
    with on_device(rows):
        block_keys_kernel[(blocks, batch)](state, now, n, blocks, TOKENS=TOKENS, **options(4))
        for step in range(k):
            dpp_step_kernel[(blocks, batch)](
                rows, state, factor, now, then, order, n, width, blocks, k, step,
                torch.finfo(torch.float32).tiny,
                BLOCKS=power_of_two(blocks), TOKENS=TOKENS, FEATURES=FEATURES, DEPTH=DEPTH,
                **options(4),
            )  # fmt: skip
            now, then = then, now
    return order
