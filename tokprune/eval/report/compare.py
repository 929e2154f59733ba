"""Which methods differ from one another, and does the best one beat chance?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tokprune.eval.report.analysis import Analysis, Interval, Result, difference
from tokprune.eval.report.statistics import flips, holm, mcnemar

#: below this an adjusted p counts as a difference
ALPHA = 0.05


@dataclass(frozen=True)
class Pair:
    """Two methods on one task: ``better`` has more correct answers, ``p`` is McNemar's, adjusted
    for all pairs and tasks together (Holm)."""

    task: str
    better: str
    worse: str
    gap: float
    p: float

    @property
    def significant(self) -> bool:
        return self.p < ALPHA


@dataclass(frozen=True)
class Differences:
    """Pairs of methods at one budget."""

    budget: float
    variants: tuple[str, ...]
    pairs: tuple[Pair, ...]

    def tasks(self) -> dict[str, list[Pair]]:
        """Significant pairs per task; tasks without any are there with an empty list."""
        found: dict[str, list[Pair]] = {pair.task: [] for pair in self.pairs}
        for pair in self.pairs:
            if pair.significant:
                found[pair.task].append(pair)
        return found

    def wins(self, first: str, second: str) -> int:
        """Tasks on which ``first`` is significantly better than ``second``."""
        return sum(p.significant and (p.better, p.worse) == (first, second) for p in self.pairs)


def differences(analysis: Analysis) -> Differences:
    """McNemar between all methods (no controls) at the analysis' budget, per task."""
    here = [r for r in analysis.at_budget() if not r.point.control and r.counts]
    found: list[tuple[str, Result, Result, float]] = []
    lost, gained = [], []
    for task in analysis.data.tasks:
        where = analysis.data.in_tasks([task])
        for i, a in enumerate(here):
            for b in here[i + 1 :]:
                counted = flips(a.point.first[where], b.point.first[where])
                first, second = (a, b) if counted.lost >= counted.gained else (b, a)
                gap = abs(counted.lost - counted.gained) / counted.n if counted.n else math.nan
                found.append((task, first, second, gap))
                lost.append(counted.lost)
                gained.append(counted.gained)
    adjusted = holm(mcnemar(np.array(lost, int), np.array(gained, int)))
    return Differences(
        analysis.at,
        tuple(r.point.variant for r in here),
        tuple(
            Pair(task, a.point.variant, b.point.variant, gap, float(p))
            for (task, a, b, gap), p in zip(found, adjusted)
        ),
    )


@dataclass(frozen=True)
class Contest:
    """Best method against a control at one budget."""

    best: Result
    control: Result
    #: difference of macro accuracies, and its 95 % interval
    gap: float
    interval: Interval
    #: the interval widened for choosing the best of ``among`` methods on these items (Bonferroni)
    corrected: Interval
    among: int


def contest(analysis: Analysis) -> Contest | None:
    """The best method against the control that draws at random; None where the budget has no
    finished method, or no such control."""
    here = analysis.at_budget()
    methods = [r for r in here if not r.point.control and r.counts]
    against = [r for r in here if r.point.control and "seed" in r.point.options]
    if not methods or not against:
        return None
    best = methods[0]
    gap, bounds = difference(analysis, best, against[0])
    _, corrected = difference(analysis, best, against[0], level=1 - 0.05 / len(methods))
    return Contest(best, against[0], gap, bounds, corrected, len(methods))
