"""Protected key tokens and the dual-attention filter (MustDrop)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokprune.operators.checks import check_mask
from tokprune.operators.topk import rank

__all__ = ["filter_score", "key_mask", "key_tokens", "text_attention"]


def key_scores(cls_row: Tensor) -> Tensor:
    """[CLS] attention: head mean of what the class token pays to each other token.

    Args:
        cls_row: [..., H, 1+M] softmax row of the class token, itself in column 0.

    Returns:
        [..., M] float32.

    Raises:
        ValueError: ``cls_row`` has fewer than two dimensions or no column.

    Source: MustDrop, arXiv 2411.10803, key tokens.
    """
    if cls_row.dim() < 2 or cls_row.shape[-1] < 1:
        raise ValueError(f"cls_row has shape {tuple(cls_row.shape)}; it should be [..., H, 1+M]")
    return cls_row[..., 1:].mean(-2, dtype=torch.float32)


def key_tokens(cls_row: Tensor, rate: float = 0.08, valid: Tensor | None = None) -> Tensor:
    """The ⌈rate · M⌉ tokens of most [CLS] attention, by falling attention.

    Args:
        cls_row: [B, H, 1+M] softmax row of the class token, itself in column 0.
        rate: share of the tokens, in (0, 1].
        valid: [B, M] bool, real tokens; None means all. M then counts each sample's real tokens.

    Returns:
        LongTensor [B, k] with k = ⌈rate · M⌉, the class token not counted; of equal scores the
        lower position first; −1 after the keys of samples with fewer.

    Raises:
        ValueError: shapes do not match, ``rate`` outside (0, 1].

    Source: MustDrop, arXiv 2411.10803, key tokens.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}; it should be in (0, 1]")
    if cls_row.dim() != 3:
        raise ValueError(f"cls_row has shape {tuple(cls_row.shape)}; it should be [B, H, 1+M]")
    score = key_scores(cls_row)
    tokens = score.shape[-1]
    k = math.ceil(rate * tokens)
    if valid is None:
        return rank(score)[:, :k]
    check_mask("valid", valid, score.shape)
    index = rank(score.masked_fill(~valid, -torch.inf))[:, :k]
    wanted = torch.tensor([math.ceil(rate * m) for m in range(tokens + 1)])
    wanted = wanted.to(score.device, non_blocking=True)
    beyond = torch.arange(k, device=score.device) >= wanted[valid.sum(-1)][:, None]
    return index.masked_fill(beyond, -1)


def key_mask(index: Tensor, n: int) -> Tensor:
    """Mark key tokens by position.

    Args:
        index: [..., k] long, positions in any order; negative ones are ignored.
        n: number of tokens.

    Returns:
        [..., n] bool.
    """
    mask = torch.zeros(*index.shape[:-1], n + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(-1, index.masked_fill(index < 0, n), True)[..., :n]


def text_attention(
    attn: Tensor, row_valid: Tensor | None = None, col_valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Total and greatest text attention that each image token gets, head mean.

    Args:
        attn: [..., H, R, n] probabilities, normalised over all keys of the sequence: rows of the
            text after the image, image columns. R = 0 is allowed.
        row_valid: [..., R] bool, rows that count; None means all.
        col_valid: [..., n] bool, real image tokens; None means all.

    Returns:
        (sum over rows [..., n], maximum over rows [..., n]), float32; 0 without a row and at
        columns that are not valid.

    Raises:
        ValueError: shapes do not match.

    Source: MustDrop, arXiv 2411.10803, dual-attention filtering.
    """
    if attn.dim() < 3:
        raise ValueError(f"attn has shape {tuple(attn.shape)}; it should be [..., H, R, n]")
    mean = attn.mean(-3, dtype=torch.float32)
    if row_valid is not None:
        check_mask("row_valid", row_valid, mean.shape[:-1])
        mean = mean.masked_fill(~row_valid[..., None], 0.0)
    if col_valid is not None:
        check_mask("col_valid", col_valid, (*mean.shape[:-2], mean.shape[-1]))
        mean = mean.masked_fill(~col_valid[..., None, :], 0.0)
    total = mean.sum(-2)
    return total, mean.amax(-2) if mean.shape[-2] else torch.zeros_like(total)


def filter_score(total: Tensor, peak: Tensor, gamma: float = 1.0, alpha: float = 0.0) -> Tensor:
    """One number per token that is at least 1 exactly where the dual filter keeps it.

    q = max(g/(γ·Σg), m/α); a limit of 0 keeps everything (q = ∞). The top K of q is a form of the
    filter with a fixed count (ours, not published).

    Args:
        total: [..., n] g, from ``text_attention``, of one image.
        peak: [..., n] m, from ``text_attention``.
        gamma: γ ≥ 0, share of the total that a token needs.
        alpha: α ≥ 0, probability that a token needs in one row.

    Returns:
        [..., n] float32.

    Raises:
        ValueError: ``gamma`` or ``alpha`` negative, shapes differ.

    Source: thresholds of MustDrop, arXiv 2411.10803; the score is ours.
    """
    if gamma < 0 or alpha < 0:
        raise ValueError(f"gamma is {gamma} and alpha is {alpha}; both should be at least 0")
    if total.shape != peak.shape:
        raise ValueError(f"peak has shape {tuple(peak.shape)}; it should be {tuple(total.shape)}")
    total, peak = total.float(), peak.float()
    limit = gamma * total.sum(-1, keepdim=True)
    by_share = (total / limit).masked_fill_(limit == 0, torch.inf)
    if alpha == 0:
        return torch.full_like(by_share, torch.inf)
    # Divided by a tensor: a number would become a multiplication by its rounded inverse.
    return torch.maximum(by_share, peak / torch.full_like(peak, float(alpha)))
