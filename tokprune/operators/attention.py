"""Score rows: the few rows of an attention map that a method reads, never the map itself."""

from __future__ import annotations

import torch
from torch import Tensor


def repeat_heads(k: Tensor, heads: int) -> Tensor:
    """Repeat grouped key (or value) heads to the number of query heads.

    Args:
        k: [B, Hkv, L, d]; query head h belongs to key head h // (heads // Hkv).
        heads: number of query heads, a multiple of Hkv.

    Returns:
        [B, heads, L, d]; ``k`` itself, not a copy, when Hkv == heads.

    Raises:
        ValueError: ``heads`` is not a positive multiple of Hkv.
    """
    groups = _groups(heads, k.shape[-3])
    return k if groups == 1 else k.repeat_interleave(groups, dim=-3)


def attention_rows(
    q_rows: Tensor, k: Tensor, scaling: float | None = None, allowed: Tensor | None = None
) -> Tensor:
    """Softmax attention of some query rows over all allowed keys, in float32.

    Grouped keys are read in place, without a repeated copy.

    Args:
        q_rows: [..., H, R, d] queries of the rows wanted, any float dtype, rotary applied.
        k: [..., Hkv, L, d] all keys, same leading dimensions and d.
        scaling: factor of the logits; None means 1/√d.
        allowed: [..., R, L] or [..., 1, L] bool, True where a row may look; None means everywhere.

    Returns:
        [..., H, R, L] float32; a row sums to 1, a row with no allowed key is all 0.

    Raises:
        ValueError: dimensions of ``q_rows`` and ``k`` do not match, H is not a multiple of Hkv, or
            ``allowed`` is not bool.

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1.
    """
    *lead, heads, rows, width = q_rows.shape
    if list(k.shape[:-3]) != lead or k.shape[-1] != width:
        raise ValueError(
            f"k has shape {tuple(k.shape)}; with q_rows {tuple(q_rows.shape)} it should be "
            f"{(*lead, 'Hkv', 'L', width)}"
        )
    groups = _groups(heads, k.shape[-3])
    scale = width**-0.5 if scaling is None else scaling
    q = (q_rows.float() * scale).reshape(*lead, k.shape[-3], groups * rows, width)
    logits = torch.matmul(q, k.float().transpose(-1, -2))
    logits = logits.reshape(*lead, heads, rows, k.shape[-2])
    if allowed is None:
        return logits.softmax(-1)
    if allowed.dtype != torch.bool:
        raise ValueError(f"allowed has dtype {allowed.dtype}; it should be torch.bool")
    hidden = allowed.logical_not().unsqueeze(-3)
    # The second fill turns the NaN of rows without any key into 0; elsewhere it changes nothing.
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)


def mean_rows(probs: Tensor, row_valid: Tensor | None = None) -> Tensor:
    """Attention that each key receives: mean over heads, then over rows.

    Args:
        probs: [..., H, R, L] attention rows.
        row_valid: [..., R] bool, rows that count; None means all.

    Returns:
        [..., L] float32; 0 everywhere where no row counts.

    Raises:
        ValueError: ``row_valid`` is not bool [..., R].

    Source: TransPrune, arXiv 2507.20630 (instruction-guided attention); FastV, arXiv 2403.06764,
    §4.1, with one row.
    """
    heads = probs.float().mean(-3)
    if row_valid is None:
        return heads.sum(-2) / max(1, heads.shape[-2])
    if row_valid.dtype != torch.bool or row_valid.shape != heads.shape[:-1]:
        raise ValueError(
            f"row_valid is {row_valid.dtype} {tuple(row_valid.shape)}; it should be torch.bool "
            f"{tuple(heads.shape[:-1])}"
        )
    total = heads.masked_fill(~row_valid[..., None], 0.0).sum(-2)
    return total / row_valid.sum(-1, keepdim=True).clamp(min=1)


def _groups(heads: int, key_heads: int) -> int:
    if key_heads < 1 or heads < 1 or heads % key_heads:
        raise ValueError(
            f"{heads} query heads with {key_heads} key heads; heads should be a multiple of the "
            "number of key heads"
        )
    return heads // key_heads
