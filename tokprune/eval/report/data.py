"""A run folder as arrays: items by points, ready for statistics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokprune.eval.report.legible import legible

if TYPE_CHECKING:
    from tokprune.eval.sweep.gate import Gate
    from tokprune.eval.sweep.results import Run

Floats = NDArray[np.float64]

#: numbers of a row that are averaged over the items of a point
MEASURED = (
    "tokens_in", "tokens_last", "tokens_mean", "macs", "macs_unpruned", "kv_bytes",
    "kv_bytes_unpruned", "prompt_tokens", "new_tokens", "seconds",
)  # fmt: skip


class RunFolderError(ValueError):
    """A run folder cannot be read, or holds too little for what is wanted."""


@dataclass(frozen=True)
class Item:
    """A question of a run."""

    id: str
    task: str
    image: str
    question: str
    answers: tuple[str, ...]


@dataclass
class Point:
    """One variant at one budget: a point in a plot. Several trials where several seeds were run.

    ``score`` [items]: mean over the seeds, NaN where one of them has no answer; ``first`` [items]:
    score of the first seed, for counts of correct and incorrect; ``answer`` [items]: answers of the
    first seed in the form in which they are compared, "" where missing; ``spent`` [items]: visual
    tokens of the first seed, mean over decoder layers, NaN where unknown; ``failed``: failed items
    over all seeds; ``measured``: means of :data:`MEASURED`; ``latency``: entry of latency.json;
    ``base``: the unpruned point that this one is compared with (None for that itself);
    ``gates``: of its trials (:mod:`tokprune.eval.sweep.gate`); ``places``: kept tokens by where
    they stand (:mod:`tokprune.eval.sweep.places`), of the first seed.
    """

    variant: str
    method: str | None
    options: Mapping[str, Any]
    text: str
    control: bool
    noise: bool
    budget: float
    dtype: str
    batch_size: int
    trials: tuple[str, ...]
    seeds: tuple[int, ...]
    by_seed: Floats = field(repr=False)
    score: Floats = field(repr=False)
    first: Floats = field(repr=False)
    answer: NDArray[np.object_] = field(repr=False)
    shown: NDArray[np.object_] = field(repr=False)
    answered: NDArray[np.bool_] = field(repr=False)
    spent: Floats = field(repr=False)
    failed: int
    measured: Mapping[str, float]
    latency: Mapping[str, Any] | None
    base: Point | None = None
    gates: tuple[Gate, ...] = ()
    places: Mapping[str, Sequence[int]] = field(default_factory=dict, repr=False)

    @property
    def engaged(self) -> bool:
        """Whether the method can be seen to have acted, with every seed: else it is no result."""
        return all(gate.outcome != "fail" for gate in self.gates)

    @property
    def name(self) -> str:
        """Variant and budget in words."""
        if self.variant == "none":
            return "unpruned"
        return self.variant if self.variant == "blind" else f"{self.variant} @ {self.budget:g}"

    @property
    def missing(self) -> int:
        """Items without an answer."""
        return int(np.isnan(self.score).sum())

    @property
    def nominal(self) -> bool:
        """Whether the budget holds pixels down rather than tokens (down-sampling in a tower of
        fixed resolution)."""
        tokens, full = self.measured["tokens_mean"], self.measured["tokens_in"]
        return self.variant == "downsample" and not tokens < 0.99 * full

    @property
    def tokens(self) -> float:
        """Visual tokens, mean over decoder layers; the budget where that is nominal."""
        return self.budget if self.nominal else self.measured["tokens_mean"]

    def seconds(self) -> float:
        """Median measured latency of one answer, NaN where it was not timed."""
        total = (self.latency or {}).get("total") or {}
        value = total.get("median")
        return float(value) if isinstance(value, (int, float)) else math.nan


@dataclass
class RunData:
    """Everything the report needs from a run folder.

    ``points``: what was compared, controls and the unpruned model among them; ``noise``: the
    unpruned model at other batch sizes and dtypes; ``blind``: no image; ``unreachable``: trials
    as run.json has them; ``errors``: failed items as (variant and budget, item, error);
    ``metrics``: the harness's own, {trial: {task: {metric: value}}}.
    """

    folder: Path
    run: Mapping[str, Any]
    items: list[Item]
    points: list[Point]
    noise: list[Point]
    blind: list[Point]
    unreachable: list[Mapping[str, Any]]
    errors: list[tuple[str, str, str]]
    latency: Mapping[str, Any] | None
    overlays: list[Mapping[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    @property
    def unpruned(self) -> Point:
        """The unpruned model in the run's own dtype and batch size."""
        return next(p for p in self.points if p.variant == "none")

    @property
    def media(self) -> str:
        """What the questions are about: "image" or "video"."""
        return str(self.run["benchmark"].get("media", "image"))

    @property
    def tokens(self) -> int:
        """Visual tokens of the unpruned model: the most of an image, the mean of the videos (no
        model knows the most)."""
        if self.media == "video":
            return round(self.unpruned.budget)
        return int(self.run["model"]["visual_tokens"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks with answers, in the benchmark's order."""
        here = {item.task for item in self.items}
        named = [t for t in self.run["benchmark"].get("tasks", ()) if t in here]
        return (*named, *sorted(here - set(named)))

    @property
    def headline(self) -> tuple[str, ...]:
        """Tasks that count in the macro average: the benchmark's, or all where none was run."""
        named = set(self.run["benchmark"].get("headline", ()))
        return tuple(t for t in self.tasks if t in named) or self.tasks

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The benchmark's groups of tasks, as far as they were run and are in the headline."""
        found = {
            name: tuple(t for t in tasks if t in self.headline)
            for name, tasks in self.run["benchmark"].get("groups", {}).items()
        }
        return {name: tasks for name, tasks in found.items() if tasks}

    def in_tasks(self, tasks: Sequence[str]) -> NDArray[np.bool_]:
        """[items] which questions are of these tasks."""
        wanted = set(tasks)
        return np.array([item.task in wanted for item in self.items], dtype=bool)


def load_run(folder: str | Path) -> RunData:
    """Read a run folder.

    Raises:
        RunFolderError: no run folder, corrupt files, no answers, or no unpruned trial; says which
            file and line.
    """
    run, notes = _read(folder)
    path, trials = run.folder, run.info["trials"]
    if not run.rows:
        stale = f" ({run.stale} rows are of older code or options)" if run.stale else ""
        raise RunFolderError(f"{path}: no answers yet{stale}; run or resume the sweep first")
    rows = {(row["trial"], row["item"]): row for row in run.rows}
    items = _items(run.rows)
    every = [_point(group, rows, items, run.latency) for group in _seeds(trials, rows)]
    points = [p for p in every if not p.noise and p.variant != "blind"]
    plain = [p for p in points if p.variant == "none"]
    if not plain:
        raise RunFolderError(
            f"{path}: no answers of the unpruned model (variant 'none'), which every comparison "
            "needs; run the sweep with its controls"
        )
    judged = run.gates()
    for point in every:
        point.gates = tuple(judged[trial] for trial in point.trials if trial in judged)
        fits = [p for p in plain if (p.dtype, p.batch_size) == (point.dtype, point.batch_size)]
        base = plain[0] if point.noise or not fits else fits[0]
        point.base = None if base is point else base
    return RunData(
        folder=path,
        run=run.info,
        items=items,
        points=points,
        noise=[p for p in every if p.noise],
        blind=[p for p in every if p.variant == "blind"],
        unreachable=[c for c in trials if c["status"] == "unreachable"],
        errors=_errors(trials, rows),
        latency=run.latency,
        overlays=_overlays(run, notes),
        notes=notes,
        metrics=run.metrics(),
    )


def part_of(data: RunData, images: Container[str]) -> RunData:
    """The questions about some images alone. Costs (``measured``, ``latency``) and gates stay those
    of all questions: there is more to tell them by, and nothing is chosen by their noise."""
    where = np.array([item.image in images for item in data.items], dtype=bool)
    names = ("by_seed", "score", "first", "answer", "shown", "answered", "spent")
    made: dict[int, Point] = {
        id(point): replace(point, **{name: getattr(point, name)[where] for name in names})
        for point in (*data.points, *data.noise, *data.blind)
    }
    for point in (*data.points, *data.noise, *data.blind):
        made[id(point)].base = None if point.base is None else made[id(point.base)]
    benchmark = {**data.run["benchmark"], "items": int(where.sum())}
    return replace(
        data,
        run={**data.run, "benchmark": benchmark},
        items=[item for item, inside in zip(data.items, where) if inside],
        points=[made[id(point)] for point in data.points],
        noise=[made[id(point)] for point in data.noise],
        blind=[made[id(point)] for point in data.blind],
    )


def _read(folder: str | Path) -> tuple[Run, list[str]]:
    """The run as the sweep's own reader gives it, and what it warned about."""
    from tokprune.eval.sweep import read_run

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run = read_run(folder)
            run = replace(run, info=legible(run.info), rows=legible(run.rows))
        except (ValueError, OSError) as error:
            raise RunFolderError(str(error)) from None
    notes = [str(w.message) for w in caught]
    if run.stale:
        notes.append(
            f"{run.stale} rows were left out: they were written by other code or options than "
            "run.json names"
        )
    if run.duplicates:
        notes.append(f"{run.duplicates} repeated rows were left out")
    return run, notes


def _overlays(run: Run, notes: list[str]) -> list[Mapping[str, Any]]:
    """Records for the gallery; a damaged one costs the gallery, not the report."""
    try:
        return list(legible(run.overlays()))
    except (ValueError, OSError) as error:
        notes.append(f"no gallery: {error}")
        return []


# ------------------------------------------------------------------------------ arrays


def _items(rows: Sequence[Mapping[str, Any]]) -> list[Item]:
    """Questions of all rows, in an order that does not depend on that of the rows."""
    seen: dict[str, Item] = {}
    for row in rows:
        if row["item"] not in seen:
            seen[row["item"]] = Item(
                row["item"],
                row["task"],
                row["image"],
                row["question"],
                tuple(row["answers"]),
            )
    return sorted(seen.values(), key=lambda item: (item.task, item.id))


def _seeds(
    trials: Sequence[Mapping[str, Any]], rows: Mapping[tuple[str, str], Any]
) -> list[list[Mapping[str, Any]]]:
    """Trials that have answers, those that differ only in their seed together."""
    answered = {trial for trial, _ in rows}
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for trial in trials:
        if trial["trial"] in answered:
            # keep is calibrated per trial, so two seeds may differ in it
            # options are left out: a seed is one, and so is keep, which is calibrated per trial
            key = tuple(
                trial[k] for k in ("variant", "budget", "dtype", "batch_size", "noise", "match")
            )
            found.setdefault(key, []).append(trial)
    return [sorted(group, key=lambda c: c["seed"]) for group in found.values()]


def _point(
    trials: Sequence[Mapping[str, Any]],
    rows: Mapping[tuple[str, str], Mapping[str, Any]],
    items: Sequence[Item],
    latency: Mapping[str, Any] | None,
) -> Point:
    from tokprune.eval.benchmarks.base import normalise

    by_seed = np.full((len(items), len(trials)), np.nan)
    shown = np.full(len(items), "", dtype=object)
    answered = np.zeros(len(items), dtype=bool)
    spent = np.full(len(items), np.nan)
    sums = dict.fromkeys(MEASURED, 0.0)
    n = dict.fromkeys(MEASURED, 0)
    failed = 0
    places: dict[str, list[int]] = {}
    for s, trial in enumerate(trials):
        for i, item in enumerate(items):
            row = rows.get((trial["trial"], item.id))
            if row is None:
                continue
            by_seed[i, s] = row["score"]
            bad = row["status"] != "ok"
            failed += bad
            if s == 0:
                shown[i] = row["answer"]
                answered[i] = not bad
                if not bad and row["tokens_mean"] is not None:
                    spent[i] = row["tokens_mean"]
                for name, counts in ((row["evidence"] or {}).get("places") or {}).items():
                    before = places.get(name, [0] * len(counts))
                    places[name] = [a + b for a, b in zip(before, counts, strict=True)]
            for name in MEASURED:
                value = row[name]
                if isinstance(value, (int, float)) and not bad:
                    sums[name] += value
                    n[name] += 1
    trial = trials[0]
    timed = (latency or {}).get("trials", {})
    return Point(
        variant=trial["variant"],
        method=trial["method"],
        options=trial["options"],
        text=trial["repr"],
        control=trial["control"],
        noise=trial["noise"],
        budget=float(trial["budget"]),
        dtype=trial["dtype"],
        batch_size=trial["batch_size"],
        trials=tuple(c["trial"] for c in trials),
        seeds=tuple(c["seed"] for c in trials),
        by_seed=by_seed,
        score=by_seed.mean(1),
        first=by_seed[:, 0],
        answer=np.array([normalise(str(a)) for a in shown], dtype=object),
        shown=shown,
        answered=answered,
        spent=spent,
        failed=failed,
        measured={k: sums[k] / n[k] if n[k] else math.nan for k in MEASURED},
        latency=next((timed[c["trial"]] for c in trials if c["trial"] in timed), None),
        places=places,
    )


def _errors(
    trials: Sequence[Mapping[str, Any]], rows: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    name = {c["trial"]: f"{c['variant']} @ {c['budget']:g}" for c in trials}
    found = [
        (name[trial], item, str(row.get("error") or "unknown"))
        for (trial, item), row in rows.items()
        if row["status"] != "ok"
    ]
    return sorted(found)
