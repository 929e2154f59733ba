"""How much text and image attend to each other in one decoder layer (ToDRE stage 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.operators.attention import attention_rows

#: Values of ``segment``: padding, text before the first visual token, visual tokens, later text.
PAD, PREFIX, VISUAL, TEXT = 0, 1, 2, 3

#: Attention rows computed at once.
_CHUNK = 256


def ratio_rows(segment: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which query rows the cross-modal ratios need.

    Reads ``segment`` on the host: give it a CPU tensor and no device waits.

    Args:
        segment: [B, L] long: 0 padding, 1 prefix text, 2 visual, 3 text after the first visual.

    Returns:
        ``text_rows`` [B, R] long, the positions of text rows, filled up with −1, and
        ``visual_rows`` [B, Rv] long, the visual positions that follow some text row, or None when
        there are none (then α_vt is 0 under a causal mask). Both on the device of ``segment``.

    Raises:
        ValueError: ``segment`` is not [B, L].

    Source: ToDRE, arXiv 2505.18757v2, eq. 8.
    """
    if segment.dim() != 2:
        raise ValueError(f"segment has shape {tuple(segment.shape)}; it should be [B, L]")
    host = segment.cpu()
    text = host == TEXT
    late_visual = (host == VISUAL) & (text.cumsum(1) > 0)
    visual_rows = _positions(late_visual).to(segment.device) if bool(late_visual.any()) else None
    return _positions(text).to(segment.device), visual_rows


def cross_modal_ratio(
    q: Tensor,
    k: Tensor,
    segment: Tensor,
    scaling: float | None = None,
    text_rows: Tensor | None = None,
    visual_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Share of text attention that goes to visual tokens, and of visual attention to text.

    α_tv = Σ_{i∈T, j∈V} A_ij / (H·|T|) and α_vt = Σ_{i∈V, j∈T} A_ij / (H·|V|) with A the causal
    softmax per head, padding keys hidden. Only the rows needed are computed.

    Args:
        q: [B, H, L, d] and
        k: [B, Hkv, L, d], after rotary embedding, any float dtype.
        segment: [B, L] long: 0 padding, 1 prefix text, 2 visual, 3 text after the first visual.
        scaling: factor of the logits; None means 1/√d.
        text_rows, visual_rows: as from ``ratio_rows``. With ``text_rows`` given the host reads
            nothing, and ``visual_rows=None`` says that no text precedes a visual token.

    Returns:
        (α_tv, α_vt), float32 [B]. α_tv is NaN for samples without T, α_vt for samples without V,
        so that "α < τ" is False there and nothing is dropped (see ``should_drop``).

    Raises:
        ValueError: shapes do not match.

    Source: ToDRE, arXiv 2505.18757v2, eq. 8.
    """
    if segment.shape != (q.shape[0], q.shape[2]) or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"segment has shape {tuple(segment.shape)}, k {tuple(k.shape)}; with q "
            f"{tuple(q.shape)} they should be [B, L] and [B, Hkv, L, d]"
        )
    if text_rows is None:
        text_rows, visual_rows = ratio_rows(segment)
    segment = segment.to(q.device)
    visual, text = segment == VISUAL, segment == TEXT
    alpha_tv = _mass(q, k, segment, scaling, text_rows, visual) / text.sum(1)
    if visual_rows is None:
        mass = torch.zeros_like(alpha_tv)
    else:
        mass = _mass(q, k, segment, scaling, visual_rows, text)
    return alpha_tv, mass / visual.sum(1)


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


def _positions(mask: Tensor) -> Tensor:
    """Ascending positions of True in each row, filled up with −1."""
    count = mask.sum(1)
    width = int(count.max()) if mask.shape[0] else 0
    order = mask.logical_not().to(torch.int8).sort(dim=1, stable=True).indices[:, :width]
    return order.masked_fill(torch.arange(width) >= count[:, None], -1)


def _mass(
    q: Tensor,
    k: Tensor,
    segment: Tensor,
    scaling: float | None,
    positions: Tensor,
    columns: Tensor,
) -> Tensor:
    """Σ over rows of the head-mean weight on ``columns``: [B]."""
    column = torch.arange(k.shape[2], device=q.device)
    total = torch.zeros(q.shape[0], device=q.device)
    one = torch.ones_like(total)
    for part in positions.to(q.device).split(_CHUNK, dim=1):
        index = part.clamp(min=0)
        rows = q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        allowed = (column <= index[..., None]) & (segment != PAD)[:, None]
        total += ratio_from_rows(
            attention_rows(rows, k, scaling, allowed), part >= 0, columns, count=one
        )
    return total
