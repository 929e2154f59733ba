"""Budgets as shares, for engines that take nothing else: rounded so that no more stays."""

from __future__ import annotations

import math
from collections.abc import Callable

from tokprune.methods.base import resolve_keep
from tokprune.methods.options import Budget

#: of a share that an engine takes as a decimal
_STEP = 1_000_000


def budget_of(keep: Budget, tokens: int | None) -> int | None:
    """What ``keep`` is of ``tokens``; None where it is a fraction and ``tokens`` are unknown.

    Raises:
        ValueError: ``keep`` drops nothing, or is a count and ``tokens`` are unknown.
    """
    if tokens is None and isinstance(keep, int):
        raise ValueError(
            f"keep={keep} is a count, and the engine takes a share: say of how many tokens, by "
            "tokens (--tokens), or by a model and image_size (--image-size); or give a fraction"
        )
    if keep == 1.0 if tokens is None else resolve_keep(keep, tokens) == tokens:
        of = "" if tokens is None else f" of {tokens} tokens"
        raise ValueError(f"keep={keep!r}{of} drops nothing; it should be less")
    return None if tokens is None else resolve_keep(keep, tokens)


def share_removed(keep: Budget, tokens: int | None, left: Callable[[int, float], int]) -> float:
    """The share to remove, in millionths, that leaves as many tokens as ``keep`` and no more.

    Args:
        tokens: before; None where nobody knows, and then the share is 1 − ``keep``.
        left: from tokens and a share to what stays, as the engine counts it.

    Raises:
        ValueError: ``keep`` drops nothing, or nothing is known that it could be a share of.
    """
    budget = budget_of(keep, tokens)
    if budget is None or tokens is None:
        return min(max(round(1 - keep, 6), 1 / _STEP), 1 - 1 / _STEP)
    # neighbours: 1 − share is no exact number, and an engine may round it the other way
    nearest = math.ceil(round((1 - budget / tokens) * _STEP, 3))
    shares = [(nearest + step) / _STEP for step in (0, 1, -1, 2, -2)]
    return max((s for s in shares if left(tokens, s) <= budget), key=lambda s: left(tokens, s))


def counted(left: int, tokens: int, budget: int, unit: str) -> str:
    """The numbers of one image in words."""
    same = "as in tokprune" if left == budget else f"{budget} in tokprune"
    return (
        f"{left} of {tokens} tokens stay, {same}; {unit} with another number of tokens keeps the "
        "same share of them, not the same number"
    )
