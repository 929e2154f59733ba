"""The oracle of a run: of each variant over its budgets, and of all methods together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokprune.eval.report.analysis import Analysis, Interval, Result
from tokprune.eval.report.oracle import Choices, Oracle, chance, choose, oracle
from tokprune.eval.report.resampling import interval, macro, macro_samples
from tokprune.eval.report.statistics import CORRECT
from tokprune.eval.sweep.reduced_input import REDUCED_INPUTS

Floats = NDArray[np.float64]

#: name of the oracle that may take any budget of any method
TOGETHER = "any method"


@dataclass(frozen=True)
class Fixed:
    """One budget for all questions. ``accuracy`` and ``tokens``: macro averages of the first
    seed, on the very questions of the oracle."""

    result: Result
    accuracy: float
    tokens: float


@dataclass(frozen=True)
class VariantOracle:
    """The oracle of one variant, over its own budgets and the unpruned model.

    Attributes:
        variant: its name, or :data:`TOGETHER`.
        control: whether the variant is a control.
        trials: the budgets it may take, fewest tokens first.
        accuracy, interval: macro average over the headline tasks, with its 95 % interval.
        tokens, tokens_interval: mean of the tokens taken; questions never correct count at the
            fewest.
        solved_tokens: the same without questions that are never correct.
        shares: budget asked for, and share of the questions for which it is the smallest that
            answers correctly.
        never: share of the questions that no budget answers correctly.
        chance, chance_tokens: accuracy and tokens if budgets were correct on questions drawn at
            random (:func:`tokprune.eval.report.oracle.chance`).
        best: the most accurate fixed budget (the one of fewer tokens of equals).
        gap, gap_interval: oracle minus ``best``, paired.
        enough: the fixed budget of fewest tokens that is not significantly less accurate than the
            unpruned model (the 95 % interval of its drop holds 0).
        equal: the fixed budget of fewest tokens that is as accurate as the oracle; None mostly.
        tasks: the oracle of each task.
    """

    variant: str
    control: bool
    trials: tuple[Fixed, ...]
    accuracy: float
    interval: Interval
    tokens: float
    tokens_interval: Interval
    solved_tokens: float
    shares: tuple[tuple[float, float], ...]
    never: float
    chance: float
    chance_tokens: float
    best: Fixed
    gap: float
    gap_interval: Interval
    enough: Fixed
    equal: Fixed | None
    tasks: dict[str, Oracle]

    @property
    def name(self) -> str:
        """The variant as tables and plots call it: controls are marked."""
        return f"{self.variant} †" if self.control else self.variant


def oracles(analysis: Analysis) -> list[VariantOracle]:
    """The oracle of every variant that has a budget of its own, controls last; then, where there
    are two methods or more, of all methods together (:data:`TOGETHER`).

    Points that lack answers do not compete (as on the frontier); failed questions are incorrect; of
    several seeds the first counts, so that no trial has more than one try. Controls stand alone:
    they are not in :data:`TOGETHER`. ``downsample``, ``frames`` and ``blind`` see another image
    or video and are left out.

    Returns:
        Nothing where the run has fewer than two budgets or the unpruned model lacks answers.
    """
    base = analysis.unpruned
    if len(analysis.budgets) < 2 or not base.complete:
        return []
    variants: dict[str, list[Result]] = {}
    for variant, results in analysis.series().items():
        fair = [r for r in results if r.counts and r.point.base is base.point]
        if fair and variant not in REDUCED_INPUTS:
            variants[variant] = fair
    methods = [r for results in variants.values() for r in results if not r.point.control]
    found = [
        _oracle(analysis, variant, [base, *results], results[0].point.control)
        for variant, results in variants.items()
    ]
    if len({r.point.variant for r in methods}) > 1:
        found.append(_oracle(analysis, TOGETHER, [base, *methods], control=False))
    return found


def most_accurate(found: Sequence[VariantOracle]) -> VariantOracle | None:
    """The single method whose oracle is the most accurate (the one of fewer tokens of equals)."""
    methods = [o for o in found if not o.control and o.variant != TOGETHER]
    return min(methods, key=lambda o: (-o.accuracy, o.tokens, o.variant), default=None)


def together(found: Sequence[VariantOracle]) -> VariantOracle | None:
    """The oracle over all methods."""
    return next((o for o in found if o.variant == TOGETHER), None)


# ------------------------------------------------------------------------------ parts


def _oracle(
    analysis: Analysis, variant: str, results: list[Result], control: bool
) -> VariantOracle:
    data, resampler = analysis.data, analysis.resampler
    base = analysis.unpruned.point
    score = np.stack([r.point.first for r in results], 1)
    cost = np.stack([_tokens(r) for r in results], 1)
    taken = choose(score, cost)
    column = taken.column.copy()
    column[taken.never] = -1
    picked = column[:, None] == np.arange(len(results))

    trials = [
        Fixed(r, float(a), float(t))
        for r, a, t in zip(results, _macro(analysis, score), _macro(analysis, cost), strict=True)
    ]
    best = min(range(len(trials)), key=lambda n: (-round(trials[n].accuracy, 12), trials[n].tokens))
    means, samples = resampler.task_means(
        np.column_stack([taken.score, taken.tokens, taken.score - score[:, best]]), data.headline
    )
    spread = macro_samples(samples)
    accuracy, tokens, gap = (float(v) for v in macro(means))
    never, *smallest = (float(v) for v in _macro(analysis, np.column_stack([taken.never, picked])))
    enough = [c for c in trials if c.result.drop_interval[0] <= 0]
    equal = [c for c in trials if c.accuracy >= accuracy - 1e-12]
    budgets = sorted({r.point.budget for r in results})
    by_chance = [
        chance(score[rows], cost[rows], base.first[rows] >= CORRECT)
        for rows in (data.in_tasks([task]) for task in data.headline)
    ]
    lucky = np.array(by_chance).mean(0)
    return VariantOracle(
        variant=variant,
        control=control,
        trials=tuple(sorted(trials, key=lambda c: c.tokens)),
        accuracy=accuracy,
        interval=interval(spread[:, 0], accuracy),
        tokens=tokens,
        tokens_interval=interval(spread[:, 1], tokens),
        solved_tokens=_solved(analysis, taken),
        shares=tuple(
            (b, sum(v for v, r in zip(smallest, results, strict=True) if r.point.budget == b))
            for b in budgets
        ),
        never=never,
        chance=float(lucky[0]),
        chance_tokens=float(lucky[1]),
        best=trials[best],
        gap=gap,
        gap_interval=interval(spread[:, 2], gap),
        enough=min(enough, key=lambda c: c.tokens),  # the unpruned model is always in it
        equal=min(equal, key=lambda c: c.tokens, default=None),
        tasks={
            task: oracle(score[rows], cost[rows])
            for task, rows in ((task, data.in_tasks([task])) for task in data.tasks)
        },
    )


def _macro(analysis: Analysis, columns: Floats) -> Floats:
    """[items, any] → mean over the headline tasks of the means over their questions."""
    data = analysis.data
    return np.array([columns[data.in_tasks([t])].mean(0) for t in data.headline]).mean(0)


def _tokens(result: Result) -> Floats:
    """[items] measured tokens; the mean of the others where a question failed."""
    spent, usual = result.point.spent, result.point.tokens
    usual = result.point.budget if np.isnan(usual) else usual
    return np.where(np.isnan(spent), usual, spent)


def _solved(analysis: Analysis, taken: Choices) -> float:
    """Macro mean of tokens over questions that are correct at some budget; tasks without any are
    left out."""
    tokens = np.where(taken.never, np.nan, taken.tokens)[:, None]
    means, _ = analysis.resampler.task_means(tokens, analysis.data.headline)
    known = means[~np.isnan(means)]
    return float(known.mean()) if len(known) else float("nan")
