"""Whole numbers of tokens for the parts of an image."""

from __future__ import annotations

from torch import Tensor

from tokprune.operators.topk import rank

__all__ = ["limit_budgets", "proportional_budgets"]


def proportional_budgets(weight: Tensor, total: int) -> Tensor:
    """A total divided in proportion to whole weights: quotas rounded down, and what is left one
    each to the largest remainders, of equal ones to the earlier part.

    Args:
        weight: [B, P] long ≥ 0, at least one above 0 in each row.
        total: ≥ 0.

    Returns:
        [B, P] long, whose rows sum to ``total``.

    Source: the largest-remainder method (Hamilton), in whole numbers.
    """
    whole = weight.sum(-1, keepdim=True)
    own = weight * total // whole
    place = (-(weight * total % whole)).argsort(dim=-1, stable=True).argsort(-1)
    return own + (place < total - own.sum(-1, keepdim=True))


def limit_budgets(budget: Tensor, limit: Tensor, priority: Tensor, total: int) -> Tensor:
    """No part gets more than it has: what is over, or not given yet, goes to parts with room, each
    filled before the next, by falling priority; of equal ones the earlier first.

    Args:
        budget: [B, P] long ≥ 0.
        limit: [B, P] long ≥ 0, tokens that each part has.
        priority: [B, P] of any dtype.
        total: tokens to give in each row, at most what all parts have.

    Returns:
        [B, P] long, at most ``limit``, whose rows sum to ``total``, unless ``budget`` within its
        limits is more than that.

    Source: ours.
    """
    own = budget.minimum(limit)
    order = rank(priority)
    room = (limit - own).gather(1, order)
    left = total - own.sum(-1, keepdim=True)
    more = room.minimum((left - (room.cumsum(-1) - room)).clamp(min=0))
    return own.scatter_add(1, order, more)
