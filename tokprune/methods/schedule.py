"""Budgets of methods that drop in several steps: one per step, or the last one for all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tokprune.engine.contracts import ModelFacts
from tokprune.methods.base import BudgetSchedule, check_fits, check_keep, resolve_keep

#: absorbs rounding of powers, so that 576 · (1/8)^(1/3) is 288
_ROUNDING = 1e-6


def check_layers(layers: Sequence[int], name: str, first: int = 0) -> None:
    """A sequence of different layer numbers, ascending, none below ``first``.

    Raises:
        ValueError: it is empty or something else.
    """
    fine = isinstance(layers, Sequence) and len(layers) > 0 and all(
        isinstance(x, int) and not isinstance(x, bool) and x >= first for x in layers
    )  # fmt: skip
    if not fine or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"{name}={layers!r} should be a sequence of ascending layer numbers from {first} on"
        )


def check_steps(keep: BudgetSchedule, steps: int, name: str) -> None:
    """A budget, or a sequence with one budget per step that never rises.

    Args:
        keep: to be checked.
        steps: number of steps.
        name: the option that lists the layers of the steps.

    Raises:
        ValueError, TypeError: it is neither.
    """
    if not isinstance(keep, Sequence) or isinstance(keep, str):
        check_keep(keep)
        return
    if len(keep) != steps:
        raise ValueError(
            f"keep={keep!r} should hold one budget per layer of {name}, {steps} in all"
        )
    for i, budget in enumerate(keep):
        check_keep(budget, f"keep[{i}]")
    for before, after in itertools.pairwise(keep):
        if type(before) is type(after) and after > before:
            raise ValueError(f"keep={keep!r} should not rise from one step to the next")


def check_steps_fit(keep: BudgetSchedule, facts: ModelFacts) -> None:
    """No count of a schedule is larger than an image of the model.

    Raises:
        ValueError: names the count and the largest that makes sense.
    """
    for budget in keep if isinstance(keep, Sequence) else (keep,):
        check_fits(budget, facts)


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
