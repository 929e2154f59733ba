"""Published, ours, gap and tolerance, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokprune.eval.published import BENCHMARKS, Row, baseline
from tokprune.eval.published.dialect import apart
from tokprune.eval.published.reproduce.figures import Missing, Ours, RunFigures
from tokprune.eval.published.reproduce.selection import why_not


@dataclass(frozen=True)
class Comparison:
    """A row of the ledger and our figure for it. ``reason``: why it was not run; ``tolerance``: see
    :meth:`tokprune.eval.published.Benchmark.tolerance`, on as many questions as were answered;
    ``base``, ``our_base``: the unpruned figures beside both, None where there are none."""

    row: Row
    ours: Ours | None
    reason: str | None
    tolerance: float | None
    base: float | None = None
    our_base: float | None = None

    @property
    def gap(self) -> float | None:
        """Ours minus published, in the row's unit."""
        return None if self.ours is None else self.ours.value - self.row.value

    @property
    def within(self) -> bool | None:
        """Whether the gap is no larger than the tolerance; None where either is unknown."""
        if self.gap is None or self.tolerance is None:
            return None
        return abs(self.gap) <= self.tolerance

    @property
    def retained(self) -> tuple[float | None, float | None]:
        """Share of the unpruned figure, published and ours: harnesses shift both figures of a
        pair, so this compares better than they do."""
        mine = None if self.ours is None or not self.our_base else self.ours.value / self.our_base
        return (self.row.value / self.base if self.base else None), mine

    @property
    def differs(self) -> tuple[str, ...]:
        """Columns of the dialects that are known of both sides, and in which they disagree."""
        if self.ours is None:
            return ()
        return apart(self.row.dialect, self.ours.dialect, self.row.benchmark, self.row.model)

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON types."""
        published, mine = self.retained
        return {
            "published": self.row.to_dict(),
            "ours": None if self.ours is None else {
                "value": self.ours.value, "interval": self.ours.interval, "n": self.ours.n,
                "run": self.ours.run, "trial": self.ours.trial, "task": self.ours.task,
                "tokens_mean": self.ours.tokens_mean, "tokens_last": self.ours.tokens_last,
                "notes": list(self.ours.notes),
            },
            "status": "run" if self.ours is not None else "not run", "reason": self.reason,
            "gap": self.gap, "tolerance": self.tolerance, "within": self.within,
            "retained": {"published": published, "ours": mine}, "differs": list(self.differs),
        }  # fmt: skip


def compare(
    rows: Sequence[Row],
    runs: Sequence[RunFigures] = (),
    reasons: Mapping[tuple[Any, ...], str] | None = None,
) -> list[Comparison]:
    """Our figures for rows of the ledger, from the first run that has them.

    Args:
        rows: of :func:`tokprune.eval.published.reproduce.select`.
        runs: of :func:`tokprune.eval.published.reproduce.read_figures`.
        reasons: why rows (by their ``key``) could not be run, where an attempt was made.
    """
    found = {row.key: _find(row, runs, (reasons or {}).get(row.key)) for row in rows}
    comparisons = []
    for row in rows:
        ours = found[row.key]
        benchmark = BENCHMARKS[row.benchmark]
        answered = ours.n if isinstance(ours, Ours) else None
        size = benchmark.size(row.split)
        n = min(answered, size) if answered and size else answered
        tolerance = None
        if row.quality:
            tolerance = benchmark.tolerance(row.value, row.metric, n, row.split)
        base = baseline(row, rows)
        beside = None if base is None else found[base.key]
        comparisons.append(
            Comparison(
                row=row,
                ours=ours if isinstance(ours, Ours) else None,
                reason=None if isinstance(ours, Ours) else ours,
                tolerance=tolerance,
                base=None if base is None else base.value,
                our_base=beside.value if isinstance(beside, Ours) else None,
            )
        )
    return comparisons


def _find(row: Row, runs: Sequence[RunFigures], tried: str | None) -> Ours | str:
    reason = why_not(row)
    if reason is not None:
        return reason
    answers = [run.find(row) for run in runs]
    for answer in answers:
        if isinstance(answer, Ours):
            return answer
    missing = [answer for answer in answers if isinstance(answer, Missing)]
    if tried is not None or not missing:
        return tried or "not run: give --run, or --execute"
    return max(missing, key=lambda m: m.near).reason
