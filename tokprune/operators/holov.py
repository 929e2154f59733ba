"""A budget for every run of an image's tokens, by its attention and how unlike its tokens are."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokprune.operators.budgets import limit_budgets
from tokprune.operators.checks import check_choice, check_number
from tokprune.operators.topk import rank, segment_topk

__all__ = ["crop_allocation", "crop_runs", "crop_scores", "select_by_crops"]

Overflow = Literal["spread", "pad"]

_ATTENTION_SCALE = 1000.0
_EPSILON = 1e-6
#: rows of a crop's similarities that are held at a time
_BLOCK = 64


def crop_runs(tokens: int, crops: int) -> list[int]:
    """Lengths of consecutive runs, the longer ones first; empty ones are left out (host).

    Args:
        tokens: N ≥ 1.
        crops: P ≥ 1.

    Raises:
        ValueError: one of them is less than 1.
    """
    if min(tokens, crops) < 1:
        raise ValueError(f"tokens is {tokens} and crops {crops}; both should be at least 1")
    crops = min(crops, tokens)
    short, longer = divmod(tokens, crops)
    return [short + 1] * longer + [short] * (crops - longer)


def crop_scores(features: Tensor, attention: Tensor, crops: int, alpha: float = 0.09) -> Tensor:
    """What the budget of each crop is proportional to.

    The mean over a crop's tokens of 1000 · attention + α · γ · v: v is the variance of a token's
    cosines with the others of its crop, its own counted as 0, and γ brings v to the mean of the
    attention, so that α decides next to nothing. A crop of one token scores its bare attention.

    Args:
        features: [B, N, D] after the projector, any float dtype; float32 inside.
        attention: [B, N] that each token receives, any float dtype.
        crops: P, number of runs; at most N are made.
        alpha: α ≥ 0.

    Returns:
        [B, min(P, N)] float32.

    Raises:
        ValueError: shapes do not match, or ``crops`` < 1.

    Source: HoloV, arXiv 2510.02912, official code.
    """
    batch, tokens, width = features.shape
    if attention.shape != (batch, tokens):
        raise ValueError(
            f"attention has shape {tuple(attention.shape)}; it should be ({batch}, {tokens})"
        )
    f, a = features.float(), attention.float()
    f = f / (torch.linalg.vector_norm(f, dim=-1, keepdim=True) + _EPSILON)
    lengths = crop_runs(tokens, crops)
    scores, start = [], 0
    for length in sorted(set(lengths), reverse=True):  # runs of one length are worked on together
        number = lengths.count(length)
        part = slice(start, start + number * length)
        start = part.stop
        own = a[:, part].view(batch, number, length)
        if length == 1:
            scores.append(own[..., 0])
            continue
        variance = _variance(f[:, part].reshape(batch, number, length, width))
        own = _ATTENTION_SCALE * own
        gamma = own.abs().mean(-1) / (variance.abs().mean(-1) + _EPSILON)
        scores.append((own + alpha * gamma[..., None] * variance).mean(-1))
    return torch.cat(scores, dim=1)


def _variance(unit: Tensor) -> Tensor:
    """[..., n] variance of each token's cosines with all tokens, its own as 0; ``unit``
    [..., n, D]."""
    n = unit.shape[-2]
    parts = []
    for rows in torch.arange(n, device=unit.device).split(_BLOCK):
        cosine = torch.matmul(unit[..., rows, :], unit.transpose(-1, -2))
        cosine[..., torch.arange(len(rows), device=rows.device), rows] = 0.0
        mean = cosine.sum(-1, keepdim=True) / (n - 1)
        parts.append((cosine - mean).square().sum(-1) / (n - 1))
    return torch.cat(parts, dim=-1)


def crop_allocation(scores: Tensor, budget: int) -> Tensor:
    """Tokens for each crop: its share of the budget, rounded down; what is left goes, one each, to
    the crops of the greatest scores.

    Args:
        scores: [B, P] ≥ 0.
        budget: T ≥ 1.

    Returns:
        [B, P] long, not limited to what a crop has; a row's sum is T, or less where more than one
        token for each crop is left.

    Raises:
        ValueError: ``budget`` < 1.

    Source: HoloV, arXiv 2510.02912, official code. Ties to the earlier crop are ours.
    """
    if budget < 1:
        raise ValueError(f"budget is {budget}; it should be at least 1")
    scores = scores.float()
    share = scores / (scores.sum(-1, keepdim=True) + _EPSILON)
    own = (share * budget).floor().long()
    left = budget - own.sum(-1, keepdim=True)
    place = rank(share).argsort(-1)
    return own + (place < left)


def select_by_crops(
    features: Tensor,
    attention: Tensor,
    budget: int,
    crops: int,
    alpha: float = 0.09,
    overflow: Overflow = "spread",
) -> Tensor:
    """Cut tokens into consecutive crops, divide the budget between them, keep in each the tokens
    of the greatest attention.

    Args:
        features, attention, crops, alpha: see ``crop_scores``.
        budget: T in 1…N.
        overflow: what is over where a crop is given more tokens than it has: "spread" gives it to
            the others, greatest score first (ours); "pad" leaves it, and −1 stands at the end of
            the result (the official code has zero vectors there).

    Returns:
        LongTensor [B, T]: crop after crop, by falling attention inside each, in order of position
        in crops that stay whole. Equal attention: the lower position first.

    Raises:
        ValueError: ``budget`` outside 1…N, unknown ``overflow``, and those of ``crop_scores``.

    Source: HoloV, arXiv 2510.02912, official code.
    """
    check_choice("overflow", overflow, Overflow)
    batch, tokens = features.shape[:2]
    check_number("budget", budget, tokens)
    scores = crop_scores(features, attention, crops, alpha)
    runs = torch.tensor(crop_runs(tokens, crops))
    crop = torch.arange(len(runs)).repeat_interleave(runs)
    crop = crop.to(features.device, non_blocking=True).expand(batch, tokens)
    lengths = runs.to(features.device, non_blocking=True).expand_as(scores)
    own = crop_allocation(scores, budget)
    if overflow == "spread":
        own = limit_budgets(own, lengths, scores, budget)
    kept = segment_topk(attention, crop, own)
    whole = (own >= lengths).gather(1, crop)
    position = torch.arange(tokens, device=features.device).expand(batch, tokens)
    inside = torch.where(whole, position, rank(attention).argsort(-1))
    key = torch.where(kept, crop * tokens + inside, len(runs) * tokens)
    order = key.argsort(dim=-1, stable=True)[:, :budget]
    return torch.where(kept.gather(1, order), order, -1)
