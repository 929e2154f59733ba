"""Attention that keys receive from many queries, without a map of it.

Two passes over the logits, as flash attention has them (Dao et al. 2022, arXiv 2205.14135): first
the log-sum-exp of each query over its keys, online; then, key by key, the sum over queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokprune.operators.kernels.door import on_device, options
from tokprune.operators.kernels.greedy import as_bytes

__all__ = ["received_sums"]


@triton.jit
def block_logits(
    q, k, first_row, first_key, rows, length, width, q_row, k_row, scaling, cap,
    CAPPED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Logits [QUERIES, KEYS] of one head: float32 sums, and float32 inputs never as TF32."""
    logits = tl.zeros((QUERIES, KEYS), tl.float32)
    row, key = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    # where a block starts may need 64 bits; what lies inside it does not
    q += tl.full((), first_row, tl.int64) * q_row
    k += tl.full((), first_key, tl.int64) * k_row
    for first in range(0, width, DEPTH):
        part = first + tl.arange(0, DEPTH)
        wide = part < width
        inside = (first_row + row < rows)[:, None] & wide[None, :]
        queries = tl.load(q + row[:, None] * q_row + part[None, :], mask=inside, other=0.0)
        inside = wide[:, None] & (first_key + key < length)[None, :]
        keys = tl.load(k + part[:, None] + key[None, :] * k_row, mask=inside, other=0.0)
        logits = tl.dot(queries, keys, logits, input_precision="ieee")
    logits *= scaling
    if CAPPED:
        # tanh from e^(−2|x|), which cannot overflow
        x = logits / cap
        e = tl.exp(-2.0 * tl.abs(x))
        t = (1.0 - e) / (1.0 + e)
        logits = cap * tl.where(x < 0, -t, t)
    return logits


@triton.jit
def visible(own, key, real, CAUSAL: tl.constexpr):
    """[QUERIES, KEYS]: which keys the queries see."""
    seen = real[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= own[:, None])
    return seen


@triton.jit(do_not_specialize=["rows", "length"])
def sums_kernel(
    q, k, lse, place, key_real, rows, length, width, heads, group, scaling, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """First pass: log-sum-exp [B, H, R] of a block of queries."""
    b = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    first_row = tl.program_id(0) * QUERIES
    row = first_row + tl.arange(0, QUERIES)
    q += b * q_batch + head.to(tl.int64) * q_head
    k += b * k_batch + (head // group).to(tl.int64) * k_head
    own = tl.load(place + b * rows + row, mask=row < rows, other=0)
    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, length, KEYS):
        key = start + tl.arange(0, KEYS)
        real = key < length
        if MASKED:
            real = real & (tl.load(key_real + b * length + key, mask=real, other=0) != 0)
        logits = block_logits(
            q, k, first_row, start, rows, length, width, q_row, k_row, scaling, cap,
            CAPPED, QUERIES, KEYS, DEPTH,
        )  # fmt: skip
        seen = visible(own, key, real, CAUSAL)
        logits = tl.where(seen, logits, float("-inf"))
        above = tl.maximum(most, tl.max(logits, 1))
        # a row that has seen no key yet has maximum −inf, and −inf − −inf would be NaN
        level = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(most - level) + tl.sum(tl.exp(logits - level[:, None]), 1)
        most = above
    level = tl.where(most == float("-inf"), 0.0, most)
    tl.store(lse + (b * heads + head) * rows + row, level + tl.log(total), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "length"])
def columns_kernel(
    q, k, lse, place, key_real, row_real, out, rows, length, width, heads, group, scaling, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    CAUSAL: tl.constexpr, OTHERS: tl.constexpr, MASKED: tl.constexpr, COUNTED: tl.constexpr,
    CAPPED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Second pass: sum [B, H, L] over the queries of what a block of keys gets from each."""
    b = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    first_key = tl.program_id(0) * KEYS
    key = first_key + tl.arange(0, KEYS)
    q += b * q_batch + head.to(tl.int64) * q_head
    k += b * k_batch + (head // group).to(tl.int64) * k_head
    real = key < length
    if MASKED:
        real = real & (tl.load(key_real + b * length + key, mask=real, other=0) != 0)
    got = tl.zeros((KEYS,), tl.float32)
    for start in range(0, rows, QUERIES):
        row = start + tl.arange(0, QUERIES)
        counted = row < rows
        own = tl.load(place + b * rows + row, mask=counted, other=0)
        level = tl.load(lse + (b * heads + head) * rows + row, mask=counted, other=0.0)
        if COUNTED:
            counted = counted & (tl.load(row_real + b * rows + row, mask=counted, other=0) != 0)
        logits = block_logits(
            q, k, start, first_key, rows, length, width, q_row, k_row, scaling, cap,
            CAPPED, QUERIES, KEYS, DEPTH,
        )  # fmt: skip
        seen = visible(own, key, real, CAUSAL) & counted[:, None]
        if OTHERS:
            seen = seen & (key[None, :] != own[:, None])
        got += tl.sum(tl.where(seen, tl.exp(logits - level[:, None]), 0.0), 0)
    tl.store(out + (b * heads + head) * length + key, got, mask=key < length)


def received_sums(
    q: Tensor, k: Tensor, scaling: float, place: Tensor, *, causal: bool, others_only: bool,
    key_valid: Tensor | None, row_valid: Tensor | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Sum [B, H, L] float32 over the rows that count.

    Args:
        q, k: [B, H, R, d] and [B, Hkv, L, d] of one float dtype.
        scaling: factor of the logits.
        place: [B, R] long, each row's own key.
        causal: rows see keys up to their own.
        others_only: what a row gives its own key does not count.
        key_valid: [B, L] bool, or None. row_valid: [B, R] bool, or None.
        softcap: bound of the logits, or None.
    """
    batch, heads, rows, width = q.shape
    length = k.shape[2]
    q, k = _in_lanes(q), _in_lanes(k)
    place = place.contiguous()
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    key_real = as_bytes(key_valid, lse)
    queries, keys, depth = blocks(q.dtype)
    numbers = (
        rows, length, width, heads, heads // k.shape[1], scaling,
        1.0 if softcap is None else softcap,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
    )  # fmt: skip
    common = {
        "CAUSAL": causal, "MASKED": key_valid is not None, "CAPPED": softcap is not None,
        "QUERIES": queries, "KEYS": keys, "DEPTH": depth,
    }  # fmt: skip
    with on_device(q):
        sums_kernel[(triton.cdiv(rows, queries), heads, batch)](
            q, k, lse, place, key_real, *numbers, **common, **options(8)
        )
        columns_kernel[(triton.cdiv(length, keys), heads, batch)](
            q, k, lse, place, key_real, as_bytes(row_valid, lse), out, *numbers, **common,
            OTHERS=others_only, COUNTED=row_valid is not None, **options(8),
        )  # fmt: skip
    return out


def blocks(dtype: torch.dtype) -> tuple[int, int, int]:
    """Queries and keys of a block, and features multiplied at once: float32 is multiplied out of
    registers, of which larger blocks would need too many."""
    return (64, 32, 16) if dtype == torch.float32 else (64, 64, 32)


def _in_lanes(x: Tensor) -> Tensor:
    """``x`` with heads in one piece each, in a dtype that products are made of."""
    # the interpreter multiplies no bfloat16
    if x.dtype == torch.float64 or (x.dtype == torch.bfloat16 and not x.is_cuda):
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()
