"""How much text and image attend to each other in one decoder layer (ToDRE stage 2)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ratio_from_rows", "should_drop"]


def ratio_from_rows(
    rows: Tensor, row_valid: Tensor, columns: Tensor, count: Tensor | None = None
) -> Tensor:
    """Share of the attention of some rows that falls on some columns.

    Args:
        rows: [B, H, R, L] attention rows, each summing to 1.
        row_valid: [B, R] bool, rows that count.
        columns: [B, L] bool, keys whose weight is summed.
        count: [B] divisor, when rows known to be zero were left out; None means the valid rows.

    Returns:
        [B] float32, between 0 and 1; NaN where the divisor is 0.

    Raises:
        ValueError: shapes do not match.

    Source: ToDRE, arXiv 2505.18757v2, eq. 8.
    """
    batch, _, number, length = rows.shape
    if row_valid.shape != (batch, number) or columns.shape != (batch, length):
        raise ValueError(
            f"row_valid has shape {tuple(row_valid.shape)} and columns {tuple(columns.shape)}; "
            f"with rows {tuple(rows.shape)} they should be {(batch, number)} and {(batch, length)}"
        )
    weight = torch.matmul(rows.float(), columns[:, None, :, None].float()).squeeze(-1).mean(1)
    mass = weight.masked_fill(~row_valid, 0.0).sum(1)
    return mass / (row_valid.sum(1) if count is None else count)


def should_drop(alpha_tv: Tensor, alpha_vt: Tensor, tau: float) -> Tensor:
    """Whether the visual tokens of each sample have become irrelevant: both ratios below τ.

    Args:
        alpha_tv, alpha_vt: [B], NaN where the sample has no text or no visual tokens.
        tau: threshold, compared strictly.

    Returns:
        [B] bool; False wherever a ratio is NaN.

    Source: ToDRE, arXiv 2505.18757v2, §3.3.
    """
    return (alpha_tv < tau) & (alpha_vt < tau)
