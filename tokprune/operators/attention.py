"""The few rows of an attention map that a method needs, never the map itself."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.operators.checks import check_mask

__all__ = ["attention_rows", "mean_rows"]


def attention_rows(
    q_rows: Tensor, k: Tensor, scaling: float | None = None, allowed: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of some query rows over all allowed keys, in float32.

    Grouped keys are read in place, without a repeated copy.

    Args:
        q_rows: [..., H, R, d] queries of the rows wanted, any float dtype, rotary applied.
        k: [..., Hkv, L, d] all keys, same leading dimensions and d.
        scaling: factor of the logits; None means 1/√d.
        allowed: [..., R, L] or [..., 1, L] bool, True where a row may look; None means everywhere.
        softcap: bound c of the logits, c · tanh(x / c) (Gemma 2); None means none.

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
    groups, over = divmod(heads, max(1, k.shape[-3]))
    if groups < 1 or over:
        raise ValueError(
            f"{heads} query heads with {k.shape[-3]} key heads; heads should be a multiple of the "
            "number of key heads"
        )
    scale = width**-0.5 if scaling is None else scaling
    q = (q_rows.float() * scale).reshape(*lead, k.shape[-3], groups * rows, width)
    logits = torch.matmul(q, k.float().transpose(-1, -2))
    logits = logits.reshape(*lead, heads, rows, k.shape[-2])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if allowed is None:
        return logits.softmax(-1)
    if allowed.dtype != torch.bool:
        raise ValueError(f"allowed has dtype {allowed.dtype}; it should be torch.bool")
    return masked_softmax(logits, allowed.logical_not().unsqueeze(-3))


def masked_softmax(logits: Tensor, hidden: Tensor) -> Tensor:
    """Softmax over the last dimension without the ``hidden`` entries, which get 0."""
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
    check_mask("row_valid", row_valid, heads.shape[:-1])
    total = heads.masked_fill(~row_valid[..., None], 0.0).sum(-2)
    return total / row_valid.sum(-1, keepdim=True).clamp(min=1)
