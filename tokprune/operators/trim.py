"""The tokens of the highest score, and one for the mean of all others (TRIM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.operators.checks import check_points
from tokprune.operators.rows import take_rows
from tokprune.operators.topk import rank

__all__ = ["WithMean", "keep_and_mean"]


@dataclass(frozen=True, eq=False)
class WithMean:
    """Kept tokens in positional order, then the mean of the others where there are any."""

    #: [B, k + 1, d] in the dtype of the features; [B, n, d] where k = n
    out: Tensor
    #: [B, k] long, ascending
    kept: Tensor
    #: [B, n − k] long, ascending
    others: Tensor

    @property
    def rows(self) -> Tensor:
        """[B, k + 1] long, the token that stands for each row; for the mean, the last of those in
        it."""
        return torch.cat([self.kept, self.others[:, -1:]], dim=1)

    @property
    def group(self) -> Tensor:
        """[B, n] long, the row that holds each token."""
        number, k = self.kept.shape
        group = self.kept.new_full((number, k + self.others.shape[1]), k)
        own = torch.arange(k, device=group.device).expand(number, k)
        return group.scatter(1, self.kept, own)


def keep_and_mean(x: Tensor, score: Tensor, k: int) -> WithMean:
    """The k tokens of the highest score as they are, and the mean of the n − k others.

    Args:
        x: [B, n, d] features of any float dtype; the mean is taken in float32.
        score: [B, n] of any float dtype, without NaN; of equal scores the lower position stays.
        k: tokens to keep, 1 ≤ k ≤ n; of all n tokens nothing is left for a mean, and none is added
            (the official code fails).

    Raises:
        ValueError: ``k`` out of range, or shapes do not match.

    Source: TRIM, arXiv 2409.10994, and its code.
    """
    check_points(x)
    n = x.shape[1]
    if score.shape != x.shape[:2]:
        raise ValueError(f"score has shape {tuple(score.shape)}; it should be {tuple(x.shape[:2])}")
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; it should be between 1 and the number of tokens, {n}")
    order = rank(score)
    kept, others = order[:, :k].sort(-1).values, order[:, k:].sort(-1).values
    out = take_rows(x, kept)
    if k < n:
        mean = take_rows(x, others).mean(1, keepdim=True, dtype=torch.float32)
        out = torch.cat([out, mean.to(x.dtype)], dim=1)
    return WithMean(out, kept, others)
