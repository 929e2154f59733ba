"""Rank image tokens by the attention they receive from the last prompt token (FastV)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.operators.attention import mean_rows
from tokprune.operators.topk import keep_topk


def last_row_scores(attn_row: Tensor) -> Tensor:
    """Head mean of one attention row.

    Args:
        attn_row: [H, L] or [B, H, L] softmax row of the last valid token over all keys.

    Returns:
        [L] or [B, L] float32.

    Raises:
        ValueError: ``attn_row`` has fewer than 2 dimensions.

    Source: FastV, arXiv 2403.06764, §4.1.
    """
    if attn_row.dim() < 2:
        raise ValueError(f"attn_row has shape {tuple(attn_row.shape)}; it should be [B, H, L]")
    return attn_row.float().mean(-2)


def row_scores(rows: Tensor, row_valid: Tensor | None = None) -> Tensor:
    """Mean attention each key receives from the given rows (all text rows, or all rows).

    Args:
        rows: [..., H, R, L] softmax rows.
        row_valid: [..., R] bool, rows that count; None means all.

    Returns:
        [..., L] float32; zeros where no row counts.

    Raises:
        ValueError: ``row_valid`` does not match.

    Source: FastV, arXiv 2403.06764, §4.1 read as a mean over queries (the code uses one row).
    """
    return mean_rows(rows, row_valid)


def select(attn_row: Tensor, start: int, n: int, k: int) -> Tensor:
    """Positions that stay: all text, and the ``k`` image tokens with the highest scores.

    Args:
        attn_row: [H, L] or [B, H, L] softmax row of the last token.
        start: position of the first image token.
        n: number of image tokens.
        k: image tokens to keep, 0 ≤ k ≤ n.

    Returns:
        LongTensor [L − n + k] or [B, L − n + k], ascending; of equal scores the lower position.

    Raises:
        ValueError: the block does not fit the row, or ``k`` is out of range.

    Source: FastV, arXiv 2403.06764, §4.1.
    """
    score = last_row_scores(attn_row)
    length = score.shape[-1]
    if start < 0 or n < 0 or start + n > length:
        raise ValueError(
            f"start is {start} and n is {n}; the block should lie inside the {length} positions"
        )
    kept = keep_topk(score[..., start : start + n], k) + start
    position = torch.arange(length, device=score.device).expand(*score.shape[:-1], length)
    return torch.cat([position[..., :start], kept, position[..., start + n :]], -1)
