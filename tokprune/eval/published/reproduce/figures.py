"""Our figures: what a run folder says about a row of the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokprune.eval.published import BENCHMARKS, Row, find_benchmark, model_key
from tokprune.eval.published.benchmarks import Metric
from tokprune.eval.sweep.results import METRICS_FILE, Run, read_run


@dataclass(frozen=True)
class Ours:
    """``value``, ``interval`` (95 %, Wilson; None where the figure is no mean of answers): in the
    row's unit; ``n``: questions answered; ``tokens_mean``, ``tokens_last``: measured, None
    unpruned; ``notes``: what to know when comparing."""

    value: float
    interval: tuple[float, float] | None
    n: int
    run: str
    cell: str
    task: str
    tokens_mean: float | None
    tokens_last: float | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Missing:
    """Why a run has no figure for a row. ``near``: how much of what the row needs the run has; of
    several runs, the nearest gives the reason."""

    near: int
    reason: str


@dataclass
class RunFigures:
    """A run folder, ready to be asked. ``model``: the ledger's name of its model."""

    run: Run
    model: str
    metrics: Mapping[str, Any]
    #: benchmark → (task of the run, split that its name tells)
    tasks: dict[str, list[tuple[str, str | None]]] = field(init=False)
    _rows: dict[tuple[str, str], list[dict[str, Any]]] = field(init=False)

    def __post_init__(self) -> None:
        self.tasks, self._rows = {}, {}
        for row in self.run.rows:
            self._rows.setdefault((row["cell"], row["task"]), []).append(row)
        for task in dict.fromkeys(task for _, task in self._rows):
            found = find_benchmark(task)
            if found is not None:
                self.tasks.setdefault(found[0].name, []).append((task, found[1]))
                # SEED-Bench reports its pictures beside the whole
                if found[0].name == "seedbench":
                    self.tasks.setdefault("seedbench_image", []).append((task, found[1]))

    def find(self, row: Row) -> Ours | Missing:
        """Our figure for a row, or why there is none."""
        if self.model != row.model:
            return Missing(0, f"the run is of {self.model}")
        fitting = [
            (task, split)
            for task, split in self.tasks.get(row.benchmark, ())
            if row.split is None or split in (None, row.split)
        ]
        if not fitting:
            split = f" ({row.split})" if row.split else ""
            return Missing(1, f"the run has no task {row.benchmark}{split}")
        metric = BENCHMARKS[row.benchmark].metrics.get(row.metric)
        if metric is None:
            return Missing(1, f"metric not measured: {row.metric}")
        cell = self._cell(row)
        if isinstance(cell, Missing):
            return cell
        return self._figure(row, cell, *fitting[0], metric)

    def _cell(self, row: Row) -> Mapping[str, Any] | Missing:
        plain = [c for c in self.run.cells.values() if not c["noise"]]
        if row.method == "none":
            own: list[Mapping[str, Any]] = [c for c in plain if c["arm"] == "none"]
        else:
            from tokprune.eval.published.reproduce.selection import full_options

            tried = [c for c in plain if c["method"] == row.method]
            if not tried:
                return Missing(2, f"the run has no {row.method}")
            wanted = {**full_options(row), "seed": None}
            same = [c for c in tried if {**c["options"], "seed": None} == wanted]
            own = [c for c in same if c["status"] == "ok"]
            # an exact arm that was refused has its options as given
            exact = {**(row.options or {}), "exact": True}
            refused = [c for c in tried if c["status"] != "ok" and c["options"] == exact]
            if not own and (refused or same):
                return Missing(4, f"not possible on this model: {(refused or same)[0]['reason']}")
            if not own:
                return Missing(3, f"the run has {row.method} at other settings")
        own = [c for c in own if any(cell == c["cell"] for cell, _ in self._rows)]
        return own[0] if own else _UNANSWERED

    def _figure(
        self, row: Row, cell: Mapping[str, Any], task: str, split: str | None, metric: Metric
    ) -> Ours | Missing:
        rows = self._rows.get((cell["cell"], task), [])
        if not rows:
            return _UNANSWERED
        notes = []
        told = self._told(cell["cell"], task, metric)
        n = len(rows)
        mean = sum(r["score"] for r in rows) / n
        interval = None
        if metric.mean:
            from tokprune.eval.report.statistics import wilson

            low, high = wilson(mean * n, n)
            interval = (low * metric.factor, high * metric.factor)
        if told is None and not metric.mean:
            return Missing(5, not_comparable(metric))
        known = BENCHMARKS[row.benchmark].size(row.split or split)
        if known is not None and n < known:
            notes.append(f"{n} of {known} questions")
        if row.split is None and len(BENCHMARKS[row.benchmark].tasks) > 1:
            notes.append(f"ours: {task}; the published split is not stated")
        if failed := sum(r["status"] != "ok" for r in rows):
            notes.append(f"{failed} failed")
        if not self.run.info["finished"]:
            notes.append("run not finished")
        return Ours(
            value=told if told is not None else mean * metric.factor,
            interval=interval,
            n=n,
            run=str(self.run.folder),
            cell=cell["cell"],
            task=task,
            tokens_mean=_mean(rows, "tokens_mean"),
            tokens_last=_mean(rows, "tokens_last"),
            notes=tuple(notes),
        )

    def _told(self, cell: str, task: str, metric: Metric) -> float | None:
        """The harness's own figure in the row's unit, where it is complete."""
        given = self.metrics.get(cell, {}).get(task, {})
        # lmms-eval names them "exact_match,none"
        plain = {str(name).partition(",")[0]: value for name, value in given.items()}
        values = [plain.get(key) for key in metric.keys]
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            return None
        return metric.factor * sum(v for v in values if v is not None)


_UNANSWERED = Missing(4, "the run has not answered it yet")


def not_comparable(metric: Metric) -> str:
    """Why a figure is not to be had without the harness that defines it."""
    return (
        f"not comparable: {' + '.join(metric.keys)} cannot be had from the scores of single "
        f"questions; it takes lmms-eval's own figure ({METRICS_FILE})"
    )


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    known = [row[name] for row in rows if row[name] is not None]
    return sum(known) / len(known) if known else None


def read_figures(folder: str | Path, model: str | None = None) -> RunFigures:
    """A run folder of ``tokprune sweep``.

    Args:
        folder: the run folder.
        model: the ledger's name of its model, where its own name does not tell.

    Raises:
        OSError: no such folder, or unreadable.
        ValueError: a file is not of the schema.
    """
    run = read_run(folder)
    metrics: Mapping[str, Any] = run.metrics()
    if not all(
        isinstance(tasks, dict) and all(isinstance(own, dict) for own in tasks.values())
        for tasks in metrics.values()
    ):
        path = run.folder / METRICS_FILE
        raise ValueError(f"{path}: should be an object {{cell: {{task: {{metric: value}}}}}}")
    return RunFigures(run, model or model_key(run.info["model"]["name"]), metrics)
