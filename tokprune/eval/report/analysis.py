"""What a run says about each point: accuracy, drop, flips, loyalty, retention, frontier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokprune.eval.report.data import Point, RunData
from tokprune.eval.report.frontier import frontier
from tokprune.eval.report.resampling import Resampler, interval, macro, macro_samples
from tokprune.eval.report.statistics import Flips, agreement, flips, holm, wilson

Floats = NDArray[np.float64]
Interval = tuple[float, float]

#: costs that a frontier is computed for
COSTS = ("tokens", "flops", "latency")


@dataclass
class TaskResult:
    """One task at one point. ``retention``: accuracy ÷ unpruned accuracy on the same items."""

    n: int
    accuracy: float
    interval: Interval
    retention: float
    flips: Flips | None


@dataclass
class Result:
    """One point. Accuracies are macro averages over the headline tasks, in [0, 1].

    ``drop``: unpruned minus this, on the items that both answered; ``flips`` and ``loyalty``
    count items of the headline tasks; ``p``: McNemar p of the flips, adjusted for the number of
    points (Holm); ``on``: the costs on whose frontier the point lies.
    """

    point: Point
    n: int
    missing: int
    accuracy: float
    interval: Interval
    drop: float
    drop_interval: Interval
    flips: Flips | None
    p: float
    loyalty: float
    tasks: dict[str, TaskResult]
    groups: dict[str, tuple[float, Interval]]
    on: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return self.missing == 0

    @property
    def counts(self) -> bool:
        """Whether it may be compared and recommended: all answers are there, and the method can be
        seen to have acted."""
        return self.complete and self.point.engaged

    def cost(self, kind: str) -> float:
        """``tokens`` (mean per layer), ``flops`` (prefill) or ``latency`` (seconds per answer)."""
        if kind == "latency":
            return self.point.seconds()
        if kind == "flops":
            return 2 * self.point.measured["macs"]
        return self.point.tokens


@dataclass
class Analysis:
    """Results of a run. ``at``: the budget that pairwise comparisons look at, in tokens;
    ``noise_gap``: largest macro difference that the unpruned model shows against itself, None
    where it was not measured."""

    data: RunData
    resampler: Resampler
    results: list[Result]
    noise: list[Result]
    blind: list[Result]
    at: float
    noise_gap: float | None

    @property
    def unpruned(self) -> Result:
        return next(r for r in self.results if r.point is self.data.unpruned)

    def at_budget(self, budget: float | None = None) -> list[Result]:
        """Results at the budget (the unpruned model left out), best first."""
        budget = self.at if budget is None else budget
        here = [
            r for r in self.results
            if r.point.variant != "none" and math.isclose(r.point.budget, budget, rel_tol=1e-6)
        ]  # fmt: skip
        return sorted(here, key=lambda r: (-_order(r.accuracy), r.point.variant))

    def series(self) -> dict[str, list[Result]]:
        """Results of each variant from the smallest budget up, methods before controls."""
        found: dict[str, list[Result]] = {}
        for r in sorted(
            self.results, key=lambda r: (r.point.control, r.point.variant, r.point.budget)
        ):
            if r.point.variant != "none":
                found.setdefault(r.point.variant, []).append(r)
        return found

    @property
    def budgets(self) -> list[float]:
        return sorted({r.point.budget for r in self.results if r.point.variant != "none"})


def analyse(data: RunData, at: float | None = None, draws: int = 4000, seed: int = 0) -> Analysis:
    """Work out everything that the report shows.

    Args:
        data: of :func:`tokprune.eval.report.data.load_run`.
        at: budget for pairwise comparisons: a count, or a float up to 1, a fraction of the visual
            tokens; the nearest that was run is taken. Default: 11 % of the tokens.
        draws, seed: of the bootstrap.

    Raises:
        ValueError: ``at`` is no positive number.
    """
    if at is not None and not (math.isfinite(at) and at > 0):
        raise ValueError(f"at={at!r} should be a number of tokens or a fraction of them, above 0")
    resampler = Resampler(
        [i.image for i in data.items], [i.task for i in data.items], draws=draws, seed=seed
    )
    everything = [*data.points, *data.noise, *data.blind]
    results = _results(data, resampler, everything)
    points = results[: len(data.points)]
    noise = results[len(data.points) : len(data.points) + len(data.noise)]
    _adjust(points)
    _frontiers(points)
    gaps = [abs(r.drop) for r in noise if not math.isnan(r.drop)]
    found = Analysis(
        data=data,
        resampler=resampler,
        results=points,
        noise=noise,
        blind=results[len(data.points) + len(data.noise) :],
        at=0.0,
        noise_gap=max(gaps) if gaps else None,
    )
    found.at = nearest_budget(found.budgets, 0.11 if at is None else at, data.tokens)
    return found


def nearest_budget(budgets: Sequence[float], wanted: float, tokens: int) -> float:
    """The budget nearest to ``wanted`` (a count, or a float up to 1: a fraction of ``tokens``)."""
    if not budgets:
        return math.nan
    count = wanted * tokens if isinstance(wanted, float) and wanted <= 1 else wanted
    return min(budgets, key=lambda b: (abs(b - count), b))


def difference(
    analysis: Analysis, first: Result, second: Result, level: float = 0.95
) -> tuple[float, Interval]:
    """Macro accuracy of ``first`` minus ``second`` on the items that both answered, with its
    paired bootstrap interval."""
    a, b = _common([first.point], [second.point])
    means, samples = _gaps(analysis.data, analysis.resampler, a - b)
    gap = float(means[0])
    return gap, interval(samples[:, 0], gap, level)


# ------------------------------------------------------------------------------ parts


def _common(first: Sequence[Point], second: Sequence[Point]) -> tuple[Floats, Floats]:
    """Scores [items, pairs] of both, NaN where either lacks an answer."""
    a = np.stack([p.score for p in first], 1)
    b = np.stack([p.score for p in second], 1)
    lacking = np.isnan(a) | np.isnan(b)
    return np.where(lacking, np.nan, a), np.where(lacking, np.nan, b)


def _gaps(data: RunData, resampler: Resampler, gap: Floats) -> tuple[Floats, Floats]:
    """Macro average of differences [items, pairs] → [pairs] and resamples [draws, pairs]. The
    mean of differences is the difference of means, and it is paired."""
    means, samples = resampler.task_means(gap, data.headline)
    return macro(means), macro_samples(samples)


def _means(data: RunData, score: Floats, tasks: Sequence[str]) -> tuple[Floats, NDArray[np.int64]]:
    """Mean score and number of answers, [tasks, points]."""
    mean = np.full((len(tasks), score.shape[1]), np.nan)
    count = np.zeros(mean.shape, dtype=np.int64)
    for t, task in enumerate(tasks):
        part = score[data.in_tasks([task])]
        count[t] = (~np.isnan(part)).sum(0)
        np.divide(np.nansum(part, 0), count[t], out=mean[t], where=count[t] > 0)
    return mean, count


def _results(data: RunData, resampler: Resampler, points: Sequence[Point]) -> list[Result]:
    score = np.stack([p.score for p in points], 1)
    bases = [p.base or p for p in points]
    means, counts = _means(data, score, data.tasks)
    headline = [data.tasks.index(t) for t in data.headline]
    _, samples = resampler.task_means(score, data.headline)
    accuracy, spread = macro(means[headline]), macro_samples(samples)
    mine, theirs = _common(points, bases)
    gap, gap_spread = _gaps(data, resampler, theirs - mine)
    own_means, base_means = _means(data, mine, data.tasks)[0], _means(data, theirs, data.tasks)[0]
    counted = data.in_tasks(data.headline)
    expected = _expected(data)
    results = []
    for n, point in enumerate(points):
        compared = point.base is not None
        base = bases[n]
        groups = {}
        for name, tasks in data.groups.items():
            rows = [data.headline.index(t) for t in tasks]
            value = float(macro(means[[data.tasks.index(t) for t in tasks]])[n])
            groups[name] = (value, interval(macro_samples(samples[:, rows])[:, n], value))
        changed = flips(base.first[counted], point.first[counted]) if compared else None
        results.append(
            Result(
                point=point,
                n=int((~np.isnan(point.score)).sum()),
                missing=max(0, expected - int((~np.isnan(point.score)).sum())),
                accuracy=float(accuracy[n]),
                interval=interval(spread[:, n], float(accuracy[n])),
                drop=float(gap[n]) if compared else 0.0,
                drop_interval=interval(gap_spread[:, n], float(gap[n])) if compared else (0.0, 0.0),
                flips=changed,
                p=changed.p if changed is not None else math.nan,
                loyalty=loyalty(point, counted),
                tasks={
                    task: _task(data, point, task, means[t, n], counts[t, n], own_means[t, n],
                                base_means[t, n])
                    for t, task in enumerate(data.tasks)
                },
                groups=groups,
            )
        )  # fmt: skip
    return results


def _expected(data: RunData) -> int:
    """Questions that every point should have answered."""
    named: Any = data.run["benchmark"].get("items")
    return max(len(data.items), named if isinstance(named, int) else 0)


def _task(
    data: RunData, point: Point, task: str, mean: float, n: int, own: float, base: float
) -> TaskResult:
    where = data.in_tasks([task])
    compared = flips(point.base.first[where], point.first[where]) if point.base else None
    kept = own / base if point.base and base > 0 else math.nan if point.base else 1.0
    bounds = wilson(float(mean) * int(n), int(n)) if n else (math.nan, math.nan)
    return TaskResult(int(n), float(mean), bounds, float(kept), compared)


def loyalty(point: Point, counted: NDArray[np.bool_]) -> float:
    """Share of items with the unpruned model's answer; a failed item has no answer, so it is
    never loyal. Items that either lacks are left out."""
    base = point.base
    if base is None:
        return 1.0
    both = counted & ~np.isnan(point.first) & ~np.isnan(base.first)
    answered = point.answered & base.answered
    same = agreement(point.answer, base.answer, both & answered)
    return math.nan if not both.any() else (
        0.0 if math.isnan(same) else same * int((both & answered).sum()) / int(both.sum())
    )  # fmt: skip


def _adjust(results: Sequence[Result]) -> None:
    for result, p in zip(results, holm([r.p for r in results])):
        result.p = float(p)


def _frontiers(results: Sequence[Result]) -> None:
    """Mark the points on each frontier. Unfinished points, nominal budgets and methods that did not
    act do not compete."""
    fair = [r for r in results if r.counts and not r.point.nominal]
    for kind in COSTS:
        on = frontier([r.cost(kind) for r in fair], [r.accuracy for r in fair])
        for result, inside in zip(fair, on):
            if inside:
                result.on = (*result.on, kind)


def _order(value: float) -> float:
    return -math.inf if math.isnan(value) else value
