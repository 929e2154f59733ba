"""Keep the highest scores, in positional order; equal scores go to the lower position."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.operators.checks import check_segment

__all__ = ["keep_topk", "rank", "segment_topk"]


def rank(score: Tensor) -> Tensor:
    """Positions by falling score; of equal scores the lower position comes first.

    Args:
        score: [..., n] of any float dtype, without NaN.

    Returns:
        LongTensor [..., n], a permutation of 0…n−1 per row.
    """
    return score.float().sort(dim=-1, descending=True, stable=True).indices


def keep_topk(score: Tensor, k: int) -> Tensor:
    """Positions of the ``k`` highest scores of each row, ascending.

    Args:
        score: [..., n] of any float dtype, without NaN.
        k: number of positions, 0 ≤ k ≤ n.

    Returns:
        LongTensor [..., k].

    Raises:
        ValueError: ``k`` is negative or larger than n.

    Source: common to all scoring methods; FastV, arXiv 2403.06764, §4.1. The tie rule is ours.
    """
    n = score.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"k is {k}; it should be between 0 and the number of scores, {n}")
    return rank(score)[..., :k].sort(dim=-1).values


def segment_topk(score: Tensor, segment: Tensor, budget: Tensor) -> Tensor:
    """Within each segment of each row, mark as many of the highest scores as its budget says.

    Segments may interleave, be empty, or hold fewer tokens than their budget. Two stable sorts, no
    host synchronisation.

    Args:
        score: [B, L] of any float dtype, without NaN.
        segment: [B, L] long, segment number in 0…S−1, or −1 where the token is no candidate.
        budget: [B, S] long, tokens to keep in each segment (≤ 0 keeps none).

    Returns:
        [B, L] bool, True at kept candidates; False wherever ``segment`` is −1.

    Raises:
        ValueError: shapes do not match.

    Source: ours (several images per prompt, each with a budget of its own).
    """
    check_segment(segment, "score", score)
    if budget.dim() != 2 or budget.shape[0] != score.shape[0]:
        raise ValueError(
            f"budget has shape {tuple(budget.shape)}; it should be [{score.shape[0]}, S]"
        )
    bins = segment + 1  # bin 0: no candidate, budget 0
    by_score = rank(score)
    by_bin = bins.gather(1, by_score).sort(dim=1, stable=True)
    order = by_score.gather(1, by_bin.indices)
    sizes = bins.new_zeros(score.shape[0], budget.shape[1] + 1)
    sizes.scatter_add_(1, bins, torch.ones_like(bins))
    start = sizes.cumsum(1) - sizes
    place = torch.arange(score.shape[1], device=score.device) - start.gather(1, by_bin.values)
    limit = torch.nn.functional.pad(budget, (1, 0)).gather(1, by_bin.values)
    return torch.zeros_like(bins, dtype=torch.bool).scatter_(1, order, place < limit)
