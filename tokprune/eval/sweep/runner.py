"""Run a sweep: match budgets, have every cell answer every question, time; resumable at any
moment. Who asks the questions is the harness's business."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import tokprune
from tokprune.eval.benchmarks.base import Item
from tokprune.eval.sweep.budgets import check_budgets
from tokprune.eval.sweep.builtin import sharing
from tokprune.eval.sweep.calibrate import Calibrator
from tokprune.eval.sweep.environment import environment, runtime
from tokprune.eval.sweep.evaluator import Batch
from tokprune.eval.sweep.harness import Harness, open_harness
from tokprune.eval.sweep.identity import code_hash, row_id
from tokprune.eval.sweep.loaded_model import Subject
from tokprune.eval.sweep.progress import Progress, Silent
from tokprune.eval.sweep.results import LATENCY_FILE, RUN_FILE, Run, read_run
from tokprune.eval.sweep.resume import check_harness, check_same, check_settings, earlier_run
from tokprune.eval.sweep.schema import SCHEMA
from tokprune.eval.sweep.settings import Settings
from tokprune.eval.sweep.store import Store
from tokprune.eval.sweep.trials import Cell, CellMaker, build_cells


def run_sweep(
    settings: Settings, *, command: Sequence[str] = (), progress: Progress | None = None
) -> Run:
    """Answer every question of a benchmark in every cell, and write the run folder.

    A folder that holds a part of the same sweep is completed; methods, budgets and seeds may have
    been added. Interrupted (Ctrl-C, SIGTERM), the run folder is valid and the model unpatched.

    Args:
        settings: what to do.
        command: how this was started, for the record.
        progress: who is told how far it is.

    Returns:
        The finished run, read back.

    Raises:
        ValueError: unknown method, task, benchmark or split; a budget that is more than an image
            has; a run folder of another model, benchmark or of other settings; a corrupt row.
            Nothing has been answered then.
        OSError: model or run folder cannot be read or written, or the disk is full: what was
            written before is intact.
        CellsFailedError: lmms-eval failed in some cells; all others have been answered.
        KeyboardInterrupt: after an interruption.
    """
    harness = open_harness(settings)
    progress = Silent() if progress is None else progress
    with Store(settings.out, settings.fresh) as store, _interruptible(), progress:
        sweep = Sweep(settings, harness, store, progress)
        sweep.prepare(command)
        try:
            sweep.run()
        finally:
            sweep.save()
    return read_run(settings.out)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Sweep:
    """One call of :func:`run_sweep`: what a harness works with.

    ``subject``: the model; ``main``, ``noise``: cells; ``sample``: batches of one item that budgets
    were matched on; ``done``: names of the rows that are there; ``info``: run.json.
    """

    def __init__(
        self, settings: Settings, harness: Harness, store: Store, progress: Progress
    ) -> None:
        self.settings, self.harness = settings, harness
        self.items, self.store, self.progress = harness.items, store, progress
        self.done = {row["row"] for row in store.rows}
        self.failed = 0
        self._names: dict[tuple[str, str], str] = {}

    # ------------------------------------------------------------------ before

    def prepare(self, command: Sequence[str]) -> None:
        """Load the model, match the budgets, write run.json."""
        settings, folder = self.settings, self.store.folder
        earlier = earlier_run(folder, len(self.store.rows))
        told: dict[str, Any] = {"benchmark": self._benchmark_entry()}
        if earlier is not None:
            check_same(earlier, told, folder)
            check_settings(earlier, settings, folder)
        self.subject = Subject.load(settings.model, settings.dtype, settings.device)
        harness = self.harness.meet(self.subject, settings)
        told["model"] = self.subject.describe()
        if earlier is not None:
            check_harness(earlier, harness, folder)
            check_same(earlier, told, folder)
        if harness is not None:
            told["harness"] = harness
        self.info: dict[str, Any] = {
            "schema": SCHEMA,
            "created": _now() if earlier is None else earlier["created"],
            "updated": _now(),
            "finished": False,
            "command": shlex.join(command),
            "tokprune": tokprune.__version__,
            "code": self.code(),
            "environment": environment(self.subject.device),
            "settings": self._settings_entry(earlier),
            **told,
            "cells": [],
        }
        self._find_cells(earlier)
        self.save()

    def code(self) -> str:
        """Hash of the code and versions that answer, as they are now."""
        return code_hash({**runtime(self.subject.device), **self.harness.runtime})

    def _benchmark_entry(self) -> dict[str, Any]:
        benchmark = self.harness.benchmark
        asked = {item.task for item in self.items}
        media = {} if benchmark.media == "image" else {"media": benchmark.media}
        return {
            "name": benchmark.name,
            **media,
            "version": benchmark.version,
            "split": self.harness.split,
            "tasks": [task for task in benchmark.tasks if task in asked],
            "groups": {name: list(tasks) for name, tasks in benchmark.groups.items()},
            "headline": [task for task in benchmark.headline if task in asked],
            "items": len(self.items),
        }

    def _settings_entry(self, earlier: dict[str, Any] | None) -> dict[str, Any]:
        """Settings as they are, with the methods, budgets and seeds of earlier calls."""
        told = self.settings.to_dict()
        told["methods"] = [
            {"name": arm.method or arm.unpatched, **arm.options} if arm.options else arm.name
            for arm in self.settings.arms(self.harness.benchmark.media)
        ]
        told["dtype"] = self.subject.dtype
        told["fresh"] = False
        if earlier is not None:
            for name in ("methods", "keep", "seeds"):
                before = list(earlier["settings"].get(name, []))
                told[name] = before + [value for value in told[name] if value not in before]
        return told

    def _find_cells(self, earlier: dict[str, Any] | None) -> None:
        """The cells of this sweep, and those that the folder has from earlier calls."""
        settings = self.settings
        known: dict[str, Cell] = {}
        if earlier is not None:
            known = {entry["cell"]: self._stored(entry) for entry in earlier["cells"]}
        unchanged = earlier is not None and earlier["code"] == self.info["code"]
        if earlier is not None and not unchanged and self.done:
            self.progress.say(
                "code or libraries have changed since this run folder was written: its "
                f"{len(self.done)} rows are kept in the file, but every question is asked again"
            )
        batch = self._sample()
        common = {
            "match": settings.match,
            "dtype": self.subject.dtype,
            "batch_size": settings.batch_size,
        }
        arms = settings.arms(self.harness.benchmark.media)
        self.progress.start("matching budgets", len(arms))
        with sharing(self) as shared:
            if shared is not None:
                shared.remember(batch.pixels)
            calibrator = Calibrator(self.subject, batch.inputs, settings.match, batch.tokens_at)
            check_budgets(settings.budgets(), calibrator.most)
            maker = CellMaker(calibrator, common)
            usable = known if unchanged else {}
            cells: list[Cell] = []
            for arm in arms:
                cells += build_cells(maker, [arm], settings.budgets(), settings.seeds, usable)
                self.progress.advance(1)
        new = {cell.id: cell for cell in cells}
        self.main = [new.pop(name, cell) for name, cell in known.items() if not cell.entry["noise"]]
        self.main += new.values()
        self.noise = [cell for cell in known.values() if cell.entry["noise"]]
        if settings.noise:
            made = self.harness.noise_cells(maker, self.subject.dtype, settings.batch_size)
            self.noise = list({cell.id: cell for cell in [*self.noise, *made]}.values())
        for cell in self.main:
            if cell.entry["reason"] is not None:
                what = "" if cell.runs else "not run; "
                self.progress.say(f"{cell.id}: {what}{cell.entry['reason']}")

    def _stored(self, entry: dict[str, Any]) -> Cell:
        try:
            return Cell.stored(entry)
        except ValueError as error:
            raise ValueError(
                f"run folder {self.store.folder}: cell {entry['cell']} is not possible any more "
                f"({error}); choose another --out, or start over with --fresh"
            ) from None

    def _sample(self) -> Batch:
        """Items for matching budgets, and the first of them for timing: evenly spaced over all,
        those with unreadable pictures left out."""
        wanted, benchmark = self.settings.calibrate, self.harness.benchmark
        readable: dict[str, Batch] = {}
        # where many items have no picture, a denser choice finds some
        for number in (wanted, 8 * wanted):
            for item in _spread(self.items, number):
                single = Batch(self.subject, benchmark, [item])
                if len(readable) < wanted and item.id not in readable and single.pixels is not None:
                    readable[item.id] = single
        if not readable:
            _ = Batch(self.subject, benchmark, self.items[:1]).inputs  # raises what is wrong
        self.sample = list(readable.values())
        return Batch(self.subject, benchmark, [one.items[0] for one in self.sample])

    # ------------------------------------------------------------------ run

    def run(self) -> None:
        """Answer what is open, then time the cells."""
        cells = [cell for cell in [*self.noise, *self.main] if cell.runs]
        total = len(cells) * len(self.items)
        open_rows = sum(len(self.pending(cell, self.items)) for cell in cells)
        if open_rows < total:
            self.progress.say(f"{total - open_rows} of {total} answers are there already")
        self.harness.answer(self)
        if self.failed:
            self.progress.say(f"{self.failed} questions failed; they count as wrong")
        if self.settings.latency:
            timing = self.harness.time_cells(self)
            if timing is not None:
                self.store.write_json(LATENCY_FILE, {**timing, "code": self.info["code"]})
        self.info["finished"] = not any(
            self.pending(cell, self.items) for cell in [*self.noise, *self.main] if cell.runs
        )

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows: all of them, or none."""
        self.store.append(rows)
        self.done.update(row["row"] for row in rows)
        self.failed += sum(row["status"] == "failed" for row in rows)

    def pending(self, cell: Cell, items: Sequence[Item]) -> list[Item]:
        """Those of the items that the cell has no row for."""
        return [item for item in items if self.name(cell, item) not in self.done]

    def name(self, cell: Cell, item: Item) -> str:
        """Identity of a row."""
        key = cell.id, item.id
        if key not in self._names:
            self._names[key] = row_id(self.info, cell.entry, item.id, item.task)
        return self._names[key]

    # ------------------------------------------------------------------ record

    def save(self) -> None:
        """Write run.json."""
        self.info["updated"] = _now()
        self.info["cells"] = [cell.entry for cell in [*self.noise, *self.main]]
        self.store.write_json(RUN_FILE, self.info)


def _spread(items: Sequence[Item], number: int) -> list[Item]:
    """``number`` items, evenly spaced over all."""
    number = min(number, len(items))
    return [items[i * len(items) // number] for i in range(number)]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
