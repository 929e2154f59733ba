"""Run the rows of the ledger that can be run, at exactly their published settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokprune.eval.published import BENCHMARKS, Row, find_benchmark
from tokprune.eval.published.reproduce.figures import not_comparable
from tokprune.eval.published.reproduce.selection import needs, why_not
from tokprune.eval.sweep.identity import canonical, digest
from tokprune.eval.sweep.results import RUN_FILE
from tokprune.eval.sweep.settings import Settings, check_harness_name, make_settings
from tokprune.eval.sweep.variants import AS_PUBLISHED

#: settings that the rows decide
DECIDED = ("model", "out", "methods", "keep", "tasks", "split", "match", "seeds", "variants",
           "controls", "noise", "latency", "harness", "benchmark")  # fmt: skip
Runner = Callable[[Settings], Any]
#: (settings of the rows' sweep, rows)
Job = tuple[Settings, list[Row]]
#: (methods, rows) of one set of tasks
Group = tuple[list[Any], list[Row]]


def execute(
    rows: Sequence[Row],
    model: str,
    out: str | Path,
    runner: Runner,
    *,
    harness: str = "builtin",
    benchmark: str | None = None,
    **settings: Any,
) -> tuple[list[Path], dict[tuple[Any, ...], str]]:
    """Sweep the rows that this version can repeat: every method with the options that the paper
    used, matched to no budget, beside the unpruned model. Rows of one set of tasks share a run
    folder; folders are resumed like any other.

    Args:
        rows: of :func:`tokprune.eval.published.reproduce.select`, of one model.
        model: folder or hub name of its weights.
        out: folder of the run folders.
        runner: runs a sweep (``tokprune.eval.sweep.run_sweep``).
        harness: "builtin", on the questions of ``benchmark``, or "lmms-eval".
        benchmark: file of questions whose tasks are named as the ledger's benchmarks.
        settings: further fields of :class:`tokprune.eval.sweep.Settings`, for example ``limit``;
            not those in :data:`DECIDED`.

    Returns:
        The run folders, and why rows (by their ``key``) were not run.

    Raises:
        ValueError: unknown harness, a benchmark file that is missing or cannot be used, or a
            setting that cannot be used.
        OSError: the benchmark file cannot be read.
    """
    jobs, reasons = plan(rows, model, out, harness=harness, benchmark=benchmark, **settings)
    folders = []
    for job, answered in jobs:
        try:
            runner(job)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            reasons.update({row.key: f"not run: {text}" for row in answered})
            if not (Path(job.out) / RUN_FILE).is_file():
                continue  # otherwise some trials may have been answered
        folders.append(Path(job.out))
    return folders, reasons


def plan(
    rows: Sequence[Row],
    model: str,
    out: str | Path,
    *,
    harness: str = "builtin",
    benchmark: str | None = None,
    **settings: Any,
) -> tuple[list[Job], dict[tuple[Any, ...], str]]:
    """The sweeps that :func:`execute` would run, and why rows are in none of them."""
    harness = check_harness_name(harness)
    if harness == "lmms-eval" and benchmark is not None:
        raise ValueError(
            f"benchmark={benchmark!r} is for harness 'builtin'; lmms-eval has its tasks"
        )
    for name in settings:
        if name in DECIDED:
            raise ValueError(f"setting {name!r} follows from the published rows; leave it out")
    task_of = _file_tasks(benchmark, settings) if harness == "builtin" else _lmms_task
    reasons: dict[tuple[Any, ...], str] = {}
    found: dict[str, tuple[dict[str, Any] | None, dict[str, None], list[Row]]] = {}
    for row in rows:
        if why_not(row) is not None:
            continue
        if harness == "lmms-eval" and (more := needs(row)) is not None:
            reasons[row.key] = f"not run: {more}"
            continue
        metric = BENCHMARKS[row.benchmark].metrics[row.metric]
        if harness == "builtin" and not metric.mean:
            reasons[row.key] = not_comparable(metric)
            continue
        task = task_of(row)
        if task is None:
            reasons[row.key] = f"no data: no task {row.benchmark}" + (
                f" ({row.split})" if row.split else ""
            )
            continue
        variant = None
        if row.method != "none":
            variant = {"name": row.method, **(row.options or {}), AS_PUBLISHED: True}
        _, tasks, wanted = found.setdefault(canonical(variant), (variant, {}, []))
        tasks[task] = None
        wanted.append(row)
    # methods of the same tasks share a sweep; the unpruned model is in all of them
    groups: dict[tuple[str, ...], Group] = {}
    for variant, tasks, wanted in found.values():
        if variant is not None:
            methods, members = groups.setdefault(tuple(sorted(tasks)), ([], []))
            methods.append(variant)
            members.extend(wanted)
    groups = _joined(groups)
    _, unpruned, plain = found.get("null", (None, {}, []))
    covered = {task for tasks in groups for task in tasks}
    if left := tuple(sorted(set(unpruned) - covered)):
        groups[left] = (["none"], [])
    for group, (_, members) in groups.items():
        members.extend(row for row in plain if task_of(row) in group)
    source = {"harness": harness} if benchmark is None else {"benchmark": str(benchmark)}
    jobs = []
    for group, (methods, members) in groups.items():
        folder = Path(out) / f"run-{digest(list(group))[:8]}"
        decided = {
            "model": model, "out": str(folder), "methods": methods, "keep": ["1/1"],
            "tasks": list(group), "controls": False, "noise": False, "latency": False, **source,
        }  # fmt: skip
        jobs.append((make_settings({**decided, **settings}, "settings"), members))
    return jobs, reasons


def _joined(groups: dict[tuple[str, ...], Group]) -> dict[tuple[str, ...], Group]:
    """Groups that lack a few tasks of a larger one go along with it, where asking their methods
    the rest costs less than asking the unpruned model once more."""
    joined: dict[tuple[str, ...], Group] = {}
    for tasks in sorted(groups, key=lambda t: (-len(t), t)):
        methods, rows = groups[tasks]
        for larger, (theirs, others) in joined.items():
            extra = len(methods) * (len(larger) - len(tasks))
            if set(tasks) <= set(larger) and extra <= len(tasks):
                theirs.extend(methods)
                others.extend(rows)
                break
        else:
            joined[tasks] = (methods, rows)
    return joined


def _lmms_task(row: Row) -> str | None:
    return BENCHMARKS[row.benchmark].task(row.split)


def _file_tasks(benchmark: str | None, settings: Mapping[str, Any]) -> Callable[[Row], str | None]:
    """Which task of a file holds the questions of a row's benchmark.

    Raises:
        ValueError, OSError: no file, or one that cannot be used.
    """
    if benchmark is None:
        raise ValueError(
            "benchmark is missing: harness 'builtin' needs a file of questions whose tasks are "
            "named as the ledger's benchmarks (gqa, pope, …); or use harness 'lmms-eval'"
        )
    from tokprune.eval.benchmarks.load import FILE_OPTIONS, load_benchmark

    tasks: dict[str, list[tuple[str, str | None]]] = {}
    options = {name: settings.get(name) for name in FILE_OPTIONS}
    for task in load_benchmark(benchmark, lazy=True, **options).tasks:
        named = find_benchmark(task)
        if named is not None:
            tasks.setdefault(named[0].name, []).append((task, named[1]))
    if not tasks:
        raise ValueError(
            f"benchmark {benchmark}: none of its tasks is named as a benchmark of the ledger "
            "(gqa, pope, …)"
        )

    def task_of(row: Row) -> str | None:
        for task, split in tasks.get(row.benchmark, ()):
            if row.split is None or split in (None, row.split):
                return task
        return None

    return task_of
