"""Our figures: what a run folder says about a row of the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokprune.eval.published import BENCHMARKS, Row, find_benchmark, model_key
from tokprune.eval.published.benchmarks import Metric
from tokprune.eval.published.dialect import Dialect, Known
from tokprune.eval.sweep.results import METRICS_FILE, Run, read_run
from tokprune.eval.sweep.schema import SCHEMA


@dataclass(frozen=True)
class Ours:
    """Our figure for a row."""

    #: in the row's unit
    value: float
    #: 95 %, Wilson; None where the figure is no mean of answers
    interval: tuple[float, float] | None
    #: questions answered
    n: int
    run: str
    trial: str
    task: str
    #: measured, None unpruned
    tokens_mean: float | None
    tokens_last: float | None
    #: what to know when comparing
    notes: tuple[str, ...] = ()
    #: what stands behind it
    dialect: Dialect = field(default_factory=dict)


@dataclass(frozen=True)
class Missing:
    """Why a run has no figure for a row. ``near``: how much of what the row needs the run has; of
    several runs, the nearest gives the reason."""

    near: int
    reason: str


@dataclass
class RunFigures:
    """A run folder's figures."""

    run: Run
    #: the ledger's name of its model
    model: str
    metrics: Mapping[str, Any]
    #: benchmark → (task of the run, split that its name tells)
    tasks: dict[str, list[tuple[str, str | None]]] = field(init=False)
    _rows: dict[tuple[str, str], list[dict[str, Any]]] = field(init=False)

    def __post_init__(self) -> None:
        self.tasks, self._rows = {}, {}
        for row in self.run.rows:
            self._rows.setdefault((row["trial"], row["task"]), []).append(row)
        for task in dict.fromkeys(task for _, task in self._rows):
            found = find_benchmark(task)
            if found is not None:
                self.tasks.setdefault(found[0].name, []).append((task, found[1]))
                # SEED-Bench reports its images beside the whole
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
        trial = self._trial(row)
        if isinstance(trial, Missing):
            return trial
        return self._figure(row, trial, *fitting[0], metric)

    def _trial(self, row: Row) -> Mapping[str, Any] | Missing:
        main = [trial for trial in self.run.trials.values() if not trial["noise"]]
        if row.method == "none":
            same = [trial for trial in main if trial["variant"] == "none"]
        else:
            # with torch behind it, which a report does without
            from tokprune.eval.published.reproduce.selection import full_options
            from tokprune.eval.sweep.variants import AS_PUBLISHED

            tried = [trial for trial in main if trial["method"] == row.method]
            if not tried:
                return Missing(2, f"the run has no {row.method}")
            wanted = _setting(row.method, full_options(row))
            equal = [t for t in tried if _setting(row.method, self._options(t)) == wanted]
            same = [trial for trial in equal if trial["status"] == "ok"]
            # a variant as published that was refused has its options as they were typed
            typed = {**(row.options or {}), AS_PUBLISHED: True}
            refused = [t for t in tried if t["status"] != "ok" and t["options"] == typed]
            if not same and (refused or equal):
                return Missing(4, f"not possible on this model: {(refused or equal)[0]['reason']}")
            if not same:
                return Missing(3, f"the run has {row.method} at other settings")
        answered = {trial for trial, _ in self._rows}
        return next((trial for trial in same if trial["trial"] in answered), _UNANSWERED)

    def _options(self, trial: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a trial by the names of today."""
        options: dict[str, Any] = trial["options"]
        if self.run.info["schema"] == SCHEMA or trial["status"] != "ok":
            return options
        from tokprune.eval.published.reproduce.selection import all_options

        return all_options(trial["method"], options)

    def _figure(
        self, row: Row, trial: Mapping[str, Any], task: str, split: str | None, metric: Metric
    ) -> Ours | Missing:
        rows = self._rows.get((trial["trial"], task), [])
        if not rows:
            return _UNANSWERED
        notes = []
        reported = self._reported(trial["trial"], task, metric)
        n = len(rows)
        mean = sum(r["score"] for r in rows) / n
        interval = None
        if metric.mean:
            from tokprune.eval.report.statistics import wilson  # needs the extra

            low, high = wilson(mean * n, n)
            interval = (low * metric.factor, high * metric.factor)
        if reported is None and not metric.mean:
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
            value=reported if reported is not None else mean * metric.factor,
            interval=interval,
            n=n,
            run=str(self.run.folder),
            trial=trial["trial"],
            task=task,
            tokens_mean=_mean(rows, "tokens_mean"),
            tokens_last=_mean(rows, "tokens_last"),
            notes=tuple(notes),
            dialect=self._dialect(split),
        )

    def _dialect(self, split: str | None) -> Dialect:
        """How the run asked: lmms-eval is known, a benchmark of files is what its maker made it."""
        harness = self.run.info.get("harness")
        if harness is None:
            return {name: Known(value, "r") for name, value in _BUILTIN.items()}
        found = {**_LMMS_EVAL, "harness": harness["name"], "harness_version": harness["version"]}
        if split is not None:
            found["vizwiz_split"] = split
        return {name: Known(value, "r") for name, value in found.items()}

    def _reported(self, trial: str, task: str, metric: Metric) -> float | None:
        """The harness's own figure in the row's unit, where it is complete."""
        metrics = self.metrics.get(trial, {}).get(task, {})
        # lmms-eval names them "exact_match,none"
        plain = {str(name).partition(",")[0]: value for name, value in metrics.items()}
        values = [plain.get(key) for key in metric.keys]
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            return None
        return metric.factor * sum(v for v in values if v is not None)


def _setting(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options but the seed; what they leave open is decided, as runs of before had it."""
    from tokprune.engine.model import ModelFacts
    from tokprune.eval.sweep.trials import json_options
    from tokprune.methods import make_method
    from tokprune.methods.setting import as_tuples

    if None in (options.get("positions", ""), options.get("decode_positions", "")):
        made = make_method(name, **as_tuples(options)).on(ModelFacts("", 0, 0))
        options = json_options(made)
    return {**options, "seed": None}


_BUILTIN = {"harness": "tokprune", "cache": "on"}
#: alike in its versions 0.3.0, 0.3.4 and 0.7.2
_LMMS_EVAL = {
    "textvqa_ocr": "no", "sqa_split": "img", "mmbench_file": "lmms en_dev, cn_dev",
    "pope": "acc, all rows", "cache": "on",
}  # fmt: skip

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
    trials: Mapping[str, Any] = run.metrics()
    if not all(
        isinstance(tasks, dict) and all(isinstance(metrics, dict) for metrics in tasks.values())
        for tasks in trials.values()
    ):
        path = run.folder / METRICS_FILE
        raise ValueError(f"{path}: should be an object {{trial: {{task: {{metric: value}}}}}}")
    return RunFigures(run, model or model_key(run.info["model"]["name"]), trials)
