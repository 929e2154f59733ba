"""Run a sweep: noise floor, every cell on every question, timing; resumable at any moment."""

from __future__ import annotations

import shlex
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from typing import Any

import tokprune
from evals import load_benchmark
from evals.base import Benchmark, Item
from tokprune.engine.shared import SharedEncoder
from tokprune.sweep.budgets import check_budgets
from tokprune.sweep.calibrate import Calibrator
from tokprune.sweep.cells import Cell, CellMaker, build_cells
from tokprune.sweep.environment import environment, runtime
from tokprune.sweep.examiner import Batch, Examiner, make_row
from tokprune.sweep.identity import code_hash, row_id
from tokprune.sweep.latency import measure_latency, timed_cells
from tokprune.sweep.noise import noise_cells
from tokprune.sweep.overlays import gallery_cells, gallery_items, overlay_name
from tokprune.sweep.progress import Progress, Silent
from tokprune.sweep.results import LATENCY_FILE, OVERLAYS, RUN_FILE, Run, read_run
from tokprune.sweep.resume import check_same, check_settings, earlier_run
from tokprune.sweep.schema import SCHEMA
from tokprune.sweep.settings import Settings
from tokprune.sweep.store import Store
from tokprune.sweep.subject import Subject


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
        KeyboardInterrupt: after an interruption.
    """
    benchmark = load_benchmark(settings.benchmark)
    tasks = None if settings.tasks is None else list(settings.tasks)
    items = benchmark.items(settings.split, tasks, settings.limit)
    if not items:
        raise ValueError(f"benchmark {benchmark.name}: no item matches split, tasks and limit")
    if settings.max_new_tokens is not None:
        benchmark.max_new_tokens = settings.max_new_tokens
    progress = Silent() if progress is None else progress
    with Store(settings.out, settings.fresh) as store, _interruptible(), progress:
        sweep = _Sweep(settings, benchmark, items, store, progress)
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


class _Sweep:
    """One call of :func:`run_sweep`."""

    def __init__(
        self, settings: Settings, benchmark: Benchmark, items: list[Item], store: Store,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.settings, self.benchmark, self.items = settings, benchmark, items
        self.store, self.progress = store, progress
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
        check_budgets(settings.budgets(), self.subject.facts.max_visual_tokens)
        told["model"] = self.subject.describe()
        if earlier is not None:
            check_same(earlier, told, folder)
        self.info: dict[str, Any] = {
            "schema": SCHEMA,
            "created": _now() if earlier is None else earlier["created"],
            "updated": _now(),
            "finished": False,
            "command": shlex.join(command),
            "tokprune": tokprune.__version__,
            "code": code_hash(runtime(self.subject.device)),
            "environment": environment(self.subject.device),
            "settings": self._settings_entry(earlier),
            **told,
            "cells": [],
        }
        self._find_cells(earlier)
        self.save()

    def _benchmark_entry(self) -> dict[str, Any]:
        benchmark, settings = self.benchmark, self.settings
        asked = {item.task for item in self.items}
        return {
            "name": benchmark.name,
            "version": benchmark.version,
            "split": settings.split or next(iter(benchmark.splits), None),
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
            for arm in self.settings.arms()
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
        arms = settings.arms()
        self.progress.start("matching budgets", len(arms))
        with self._sharing() as shared:
            if shared is not None:
                shared.remember(batch.inputs["pixel_values"])
            maker = CellMaker(Calibrator(self.subject, batch.inputs, settings.match), common)
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
            made = noise_cells(maker, self.subject.dtype, settings.batch_size)
            self.noise = list({cell.id: cell for cell in [*self.noise, *made]}.values())
        for cell in self.main:
            if not cell.runs:
                self.progress.say(f"{cell.id}: not run; {cell.entry['reason']}")

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
        readable = []
        for item in _spread(self.items, self.settings.calibrate):
            single = Batch(self.subject, self.benchmark, [item])
            if _pixels(single) is not None:
                readable.append(single)
        if not readable:
            _ = single.inputs  # raises what is wrong with it
        self.sample = readable
        return Batch(self.subject, self.benchmark, [one.items[0] for one in readable])

    # ------------------------------------------------------------------ run

    def run(self) -> None:
        """Answer what is open, then time the cells."""
        cells = [cell for cell in [*self.noise, *self.main] if cell.runs]
        total = len(cells) * len(self.items)
        open_rows = sum(len(self._pending(cell, self.items)) for cell in cells)
        if open_rows < total:
            self.progress.say(f"{total - open_rows} of {total} answers are there already")
        for cell in self.noise:
            if cell.runs:
                self._noise(cell)
        self._main()
        if self.failed:
            self.progress.say(f"{self.failed} questions failed; they count as wrong")
        if self.settings.latency:
            self._latency()
        self.info["finished"] = not any(
            self._pending(cell, self.items) for cell in [*self.noise, *self.main] if cell.runs
        )

    def _noise(self, cell: Cell) -> None:
        pending = len(self._pending(cell, self.items))
        if not pending:
            return
        subject = self.subject
        if cell.entry["dtype"] != subject.dtype:
            try:
                subject = Subject.load(
                    self.settings.model, cell.entry["dtype"], subject.device.type
                )
            except (MemoryError, RuntimeError) as error:
                cell.entry["status"] = "unreachable"
                cell.entry["reason"] = f"no room for a second copy: {' '.join(str(error).split())}"
                self.progress.say(f"{cell.id}: not run; {cell.entry['reason']}")
                return
        self.progress.start(f"noise floor, {cell.id}", pending)
        examiner = Examiner(subject, self.benchmark)
        for items in _chunks(self.items, cell.entry["batch_size"]):
            if self._pending(cell, items):
                self._answer(examiner, cell, Batch(subject, self.benchmark, items))

    def _main(self) -> None:
        cells = [cell for cell in self.main if cell.runs]
        pending = sum(len(self._pending(cell, self.items)) for cell in cells)
        if not pending:
            return
        gallery = gallery_items(self.items), gallery_cells(cells, self.subject.facts.patches)
        examiner = Examiner(self.subject, self.benchmark, gallery)
        self.progress.start("answers", pending)
        with self._sharing() as shared:
            for items in _chunks(self.items, self.settings.batch_size):
                todo = [cell for cell in cells if self._pending(cell, items)]
                if not todo:
                    continue
                batch = Batch(self.subject, self.benchmark, items)
                if shared is not None:
                    shared.remember(_pixels(batch))
                for cell in todo:
                    self._answer(examiner, cell, batch)

    def _answer(self, examiner: Examiner, cell: Cell, batch: Batch) -> None:
        """One cell on one batch. All its questions run, so that the batch is the one it was before
        an interruption; the rows that are missing are written."""
        outcomes = examiner.examine(cell, batch)
        rows = []
        now = time.time()
        for item, outcome in zip(batch.items, outcomes, strict=True):
            name = self._name(cell, item)
            if name in self.done:
                continue
            if outcome.overlay is not None:
                path = f"{OVERLAYS}/{overlay_name(item.id, cell.id)}"
                self.store.write_json(path, outcome.overlay)
            self.failed += outcome.error is not None
            rows.append(make_row(name, cell, item, outcome, self.benchmark, now))
        self.store.append(rows)
        self.done.update(row["row"] for row in rows)
        self.progress.advance(len(rows))

    def _pending(self, cell: Cell, items: Sequence[Item]) -> list[Item]:
        return [item for item in items if self._name(cell, item) not in self.done]

    def _name(self, cell: Cell, item: Item) -> str:
        """Identity of a row."""
        key = cell.id, item.id
        if key not in self._names:
            self._names[key] = row_id(self.info, cell.entry, item.id, item.task)
        return self._names[key]

    def _sharing(self) -> Any:
        return SharedEncoder(self.subject.model) if self.settings.share else nullcontext()

    def _latency(self) -> None:
        cells = timed_cells(self.main)
        known = self.store.read_json(LATENCY_FILE)
        names = {cell.id for cell in cells}
        if known is not None and (known.get("code"), set(known.get("cells", ()))) == (
            self.info["code"],
            names,
        ):
            return
        self.progress.start("timing", self.settings.latency_rounds)
        seen = 0

        def advance(done: int, total: int) -> None:
            nonlocal seen
            self.progress.advance(done - seen)
            seen = done

        timing = measure_latency(
            self.subject, self.sample[0].inputs, cells, self.settings.latency_rounds,
            self.benchmark.max_new_tokens, advance,
        )  # fmt: skip
        self.store.write_json(LATENCY_FILE, {**timing, "code": self.info["code"]})

    # ------------------------------------------------------------------ record

    def save(self) -> None:
        """Write run.json."""
        self.info["updated"] = _now()
        self.info["cells"] = [cell.entry for cell in [*self.noise, *self.main]]
        self.store.write_json(RUN_FILE, self.info)


def _pixels(batch: Batch) -> Any:
    """Pixels of a batch, None where they cannot be made (its questions then run one by one)."""
    try:
        return batch.inputs["pixel_values"]
    except Exception:
        return None


def _chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _spread(items: Sequence[Item], number: int) -> list[Item]:
    """``number`` items, evenly spaced over all."""
    number = min(number, len(items))
    return [items[i * len(items) // number] for i in range(number)]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
