"""Budgets of methods that drop in several steps: one per step, or the last one for all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from tokprune.methods.base import resolve_keep
from tokprune.methods.options import BudgetSchedule, check_keep, is_sequence

#: absorbs rounding of powers, so that 576 · (1/8)^(1/3) is 288
_ROUNDING = 1e-6


def steps_of(layers: int | Sequence[int]) -> tuple[int, ...]:
    """Layer numbers of ``prune_before``, one or several, as a tuple."""
    return tuple(layers) if isinstance(layers, Sequence) else (layers,)


def check_steps(
    keep: BudgetSchedule, steps: Sequence[int], name: str, none_left: bool = False
) -> None:
    """A budget, or a sequence with one budget per step that never rises.

    Args:
        keep: to be checked.
        steps: the layers of the steps.
        name: the option that lists them.
        none_left: a schedule may come to 0.

    Raises:
        ValueError, TypeError: it is neither.
    """
    if not is_sequence(keep):
        check_keep(keep)
        return
    assert isinstance(keep, Sequence)
    if len(keep) != len(steps):
        raise ValueError(
            f"keep={keep!r} should hold one budget per layer of {name}, {len(steps)} in all"
        )
    for i, budget in enumerate(keep):
        if not (none_left and budget == 0 and not isinstance(budget, bool)):
            check_keep(budget, f"keep[{i}]")
    for before, after in itertools.pairwise(keep):
        if type(before) is type(after) and after > before:
            raise ValueError(f"keep={keep!r} should not rise from one step to the next")


def mean_of_steps(
    entering: int, steps: Sequence[int], layers: int, after: Callable[[int, int], int]
) -> float | None:
    """Tokens of an image on the mean over decoder layers; None where a step has no layer.

    Args:
        entering: tokens that enter the decoder.
        steps: layers before which some go, ascending.
        layers: of the decoder.
        after: what step number i leaves of n tokens that it finds.
    """
    if steps and steps[-1] >= layers:
        return None
    total, now, start = 0, entering, 0
    for number, layer in enumerate(steps):
        total, start = total + now * (layer - start), layer
        now = min(now, after(number, now))
    return (total + now * (layers - start)) / layers


def of_entered(budget: int | float, entering: int | float) -> int | float:
    """A budget of all tokens of an image as one of those that entered the decoder: a count as it
    is, a fraction as the share of the fraction ``entering``."""
    return min(1.0, budget / entering + 1e-9) if isinstance(budget, float) else budget


def tokens_after(keep: BudgetSchedule, step: int, steps: int, tokens: int) -> int:
    """Tokens that a schedule leaves of an image after a step.

    Args:
        keep: one budget per step, fractions taken of ``tokens``; or the budget of the last step:
            every step then leaves the same share of what it finds.
        step: number of the step, from 0.
        steps: number of steps.
        tokens: tokens of the image before the first step.

    Returns:
        At least 1 (0 of 0 tokens), at most ``tokens``; rounded down.

    Example::

        >>> [tokens_after(0.125, step, 3, 576) for step in range(3)]
        [288, 144, 72]
    """
    if isinstance(keep, Sequence):
        return resolve_keep(keep[step], tokens)
    if not tokens or step + 1 == steps:
        return resolve_keep(keep, tokens)
    last = min(1.0, keep / tokens) if isinstance(keep, int) else keep
    return max(1, int(tokens * last ** ((step + 1) / steps) + _ROUNDING))
