"""Precision and recall of "yes", where a task knows yes and no alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokprune.eval.report.analysis import Analysis, Result
from tokprune.eval.report.data import RunData


@dataclass(frozen=True)
class YesNo:
    """A point on the yes/no tasks of a run, by the answers of its first seed. Shares in [0, 1], NaN
    where there is nothing to count.

    ``yes``: of the answers that are "yes"; ``precision``: of those that should be; ``recall``: of
    the questions whose answer is "yes", those that get it; ``f1``: harmonic mean of the two;
    ``other``: of answers that are neither.
    """

    n: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes: float
    other: float


def yes_no_tasks(data: RunData) -> tuple[str, ...]:
    """Tasks of which every question is answered by yes or no, and some by either."""
    from tokprune.eval.benchmarks.base import normalise

    accepted: dict[str, set[frozenset[str]]] = {}
    for item in data.items:
        words = frozenset(normalise(answer) for answer in item.answers)
        accepted.setdefault(item.task, set()).add(words)
    both = {frozenset({"yes"}), frozenset({"no"})}
    return tuple(task for task in data.tasks if accepted.get(task) == both)


def yes_no(analysis: Analysis, result: Result, tasks: Sequence[str]) -> YesNo:
    """A point on these tasks together; failed questions count as neither yes nor no."""
    from tokprune.eval.benchmarks.base import normalise

    data, point = analysis.data, result.point
    where = data.in_tasks(tasks) & ~np.isnan(point.first)
    told = np.where(point.answered[where], point.answer[where], "")
    right = np.array([normalise(item.answers[0]) for item in data.items], dtype=object)[where]
    yes, wanted = told == "yes", right == "yes"
    hit, n = int((yes & wanted).sum()), int(where.sum())
    precision, recall = _share(hit, int(yes.sum())), _share(hit, int(wanted.sum()))
    total = precision + recall
    f1 = 2 * precision * recall / total if total > 0 else 0.0 if total == 0 else math.nan
    other = int((~yes & (told != "no")).sum())
    return YesNo(
        n, _share(int((told == right).sum()), n), precision, recall, f1,
        _share(int(yes.sum()), n), _share(other, n),
    )  # fmt: skip


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
