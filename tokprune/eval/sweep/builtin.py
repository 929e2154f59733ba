"""Answer cells in this process: one model, all cells on a batch while its pixels are at hand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokprune.engine.shared_encoder import SharedEncoder
from tokprune.eval.benchmarks import load_benchmark
from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.sweep.evaluator import Batch, Examiner, make_row
from tokprune.eval.sweep.latency import measure_latency, timed_cells
from tokprune.eval.sweep.loaded_model import Subject
from tokprune.eval.sweep.noise import noise_cells
from tokprune.eval.sweep.overlays import gallery_cells, gallery_items, overlay_name
from tokprune.eval.sweep.results import LATENCY_FILE, OVERLAYS
from tokprune.eval.sweep.settings import Settings
from tokprune.eval.sweep.trials import Cell, CellMaker
from tokprune.inputs.frames_processor import FramesProcessor

if TYPE_CHECKING:
    from tokprune.eval.sweep.runner import Sweep


@dataclass
class OwnHarness:
    """The sweep's own way of asking; see :class:`tokprune.eval.sweep.harness.Harness`."""

    benchmark: Benchmark
    items: list[Item]
    split: str | None
    runtime: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, settings: Settings) -> OwnHarness:
        """Load the benchmark.

        Raises:
            ValueError, OSError: no such benchmark, task or split, or no item of it.
        """
        benchmark = load_benchmark(settings.benchmark)
        tasks = None if settings.tasks is None else list(settings.tasks)
        items = benchmark.items(settings.split, tasks, settings.limit)
        if not items:
            raise ValueError(f"benchmark {benchmark.name}: no item matches split, tasks and limit")
        if settings.max_new_tokens is not None:
            benchmark.max_new_tokens = settings.max_new_tokens
        return cls(benchmark, items, settings.split or next(iter(benchmark.splits), None))

    def meet(self, subject: Subject, settings: Settings) -> dict[str, Any] | None:
        if self.benchmark.media == "video" and not subject.facts.videos:
            raise ValueError(
                f"benchmark {self.benchmark.name} asks about videos, and model {subject.name} "
                f"({type(subject.model).__name__}) takes pictures only; it should be a "
                "LLaVA-NeXT-Video or LLaVA-OneVision"
            )
        if self.benchmark.media == "image" and isinstance(subject.processor, FramesProcessor):
            raise ValueError(
                f"benchmark {self.benchmark.name} asks about pictures, which model {subject.name} "
                "takes where torchvision is installed only; a benchmark of videos does without"
            )
        return None

    def noise_cells(self, maker: CellMaker, dtype: str, batch_size: int) -> list[Cell]:
        return noise_cells(maker, dtype, batch_size)

    # ------------------------------------------------------------------ answers

    def answer(self, sweep: Sweep) -> None:
        for cell in sweep.noise:
            if cell.runs:
                self._noise(sweep, cell)
        self._main(sweep)

    def _noise(self, sweep: Sweep, cell: Cell) -> None:
        pending = len(sweep.pending(cell, self.items))
        if not pending:
            return
        subject = sweep.subject
        if cell.entry["dtype"] != subject.dtype:
            try:
                subject = Subject.load(
                    sweep.settings.model, cell.entry["dtype"], subject.device.type
                )
            except (MemoryError, RuntimeError) as error:
                cell.entry["status"] = "unreachable"
                cell.entry["reason"] = f"no room for a second copy: {' '.join(str(error).split())}"
                sweep.progress.say(f"{cell.id}: not run; {cell.entry['reason']}")
                return
        sweep.progress.start(f"noise floor, {cell.id}", pending)
        examiner = Examiner(subject, self.benchmark)
        for items in _chunks(self.items, cell.entry["batch_size"]):
            if sweep.pending(cell, items):
                self._ask(sweep, examiner, cell, Batch(subject, self.benchmark, items))

    def _main(self, sweep: Sweep) -> None:
        cells = [cell for cell in sweep.main if cell.runs]
        pending = sum(len(sweep.pending(cell, self.items)) for cell in cells)
        if not pending:
            return
        whole = sweep.subject.facts.patches
        if self.benchmark.media == "video":
            whole = next(cell.entry["budget"] for cell in cells if cell.id == "none")
        gallery = gallery_items(self.items), gallery_cells(cells, whole)
        examiner = Examiner(sweep.subject, self.benchmark, gallery)
        sweep.progress.start("answers", pending)
        with sharing(sweep) as shared:
            for items in _chunks(self.items, sweep.settings.batch_size):
                todo = [cell for cell in cells if sweep.pending(cell, items)]
                if not todo:
                    continue
                batch = Batch(sweep.subject, self.benchmark, items)
                if shared is not None:
                    shared.remember(batch.pixels)
                for cell in todo:
                    self._ask(sweep, examiner, cell, batch)

    def _ask(self, sweep: Sweep, examiner: Examiner, cell: Cell, batch: Batch) -> None:
        """One cell on one batch. All its questions run, so that the batch is the one it was before
        an interruption; the rows that are missing are written."""
        outcomes = examiner.examine(cell, batch)
        rows = []
        now = time.time()
        for item, outcome in zip(batch.items, outcomes, strict=True):
            name = sweep.name(cell, item)
            if name in sweep.done:
                continue
            if outcome.overlay is not None:
                path = f"{OVERLAYS}/{overlay_name(item.id, cell.id)}"
                sweep.store.write_json(path, outcome.overlay)
            rows.append(make_row(name, cell, item, outcome, self.benchmark, now))
        sweep.add(rows)
        sweep.progress.advance(len(rows))

    # ------------------------------------------------------------------ timing

    def time_cells(self, sweep: Sweep) -> dict[str, Any] | None:
        cells = timed_cells(sweep.main)
        known = sweep.store.read_json(LATENCY_FILE)
        names = {cell.id for cell in cells}
        if known is not None and (known.get("code"), set(known.get("cells", ()))) == (
            sweep.info["code"],
            names,
        ):
            return None
        sweep.progress.start("timing", sweep.settings.latency_rounds)
        seen = 0

        def advance(done: int, total: int) -> None:
            nonlocal seen
            sweep.progress.advance(done - seen)
            seen = done

        question = sweep.sample[0]
        return measure_latency(
            sweep.subject, question.inputs, cells, sweep.settings.latency_rounds,
            self.benchmark.max_new_tokens, advance,
            {cell.id: question.inputs_for(cell) for cell in cells if cell.smaller is not None},
        )  # fmt: skip


def sharing(sweep: Sweep) -> AbstractContextManager[SharedEncoder | None]:
    """The encoder runs once for cells that leave it alone, where the settings say so."""
    return SharedEncoder(sweep.subject) if sweep.settings.share else nullcontext()


def _chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
