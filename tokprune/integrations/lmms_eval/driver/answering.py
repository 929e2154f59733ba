"""Answer cells through lmms-eval: one process for each, whose samples become rows."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.sweep.environment import environment as machine
from tokprune.eval.sweep.harness import CellsFailedError
from tokprune.eval.sweep.loaded_model import Subject
from tokprune.eval.sweep.noise import noise_cells
from tokprune.eval.sweep.results import LMMS, METRICS_FILE, scan_rows
from tokprune.eval.sweep.settings import Settings
from tokprune.eval.sweep.trials import Cell, CellMaker
from tokprune.integrations.lmms_eval.driver import arguments, child, samples, tasks
from tokprune.integrations.lmms_eval.driver.arguments import CONFIG, LOG, OUTPUT, SETTING, Base
from tokprune.integrations.lmms_eval.driver.benchmark import LmmsBenchmark
from tokprune.integrations.lmms_eval.driver.timing import answer_times

if TYPE_CHECKING:
    from tokprune.eval.sweep.runner import Sweep


@dataclass
class LmmsHarness:
    """lmms-eval as the one who asks; see :class:`tokprune.eval.sweep.harness.Harness`.

    ``called``: names that make lmms-eval run all tasks, groups and tags among them.
    """

    benchmark: Benchmark
    items: list[Item]
    called: tuple[str, ...]
    runtime: dict[str, str]
    split: str | None = None
    _base: Base = field(init=False)
    _subject: Subject = field(init=False)

    @classmethod
    def open(cls, settings: Settings) -> LmmsHarness:
        """Load the tasks.

        Raises:
            ValueError: lmms-eval is not installed, an unknown task or base, or no document.
        """
        version = tasks.lmms_version()
        if settings.base is not None:
            arguments.check_base(settings.base, settings)
        assert settings.tasks is not None
        loaded = tasks.load_tasks(settings.tasks, settings.include_path)
        benchmark = LmmsBenchmark(loaded)
        items = benchmark.items(limit=settings.limit)
        if not items:
            raise ValueError(f"tasks {', '.join(settings.tasks)}: hold no document")
        return cls(benchmark, items, loaded.called, {"lmms_eval": version})

    def meet(self, subject: Subject, settings: Settings) -> dict[str, Any]:
        self._base = arguments.find_base(settings, subject)
        self._subject = subject
        return {
            "name": "lmms-eval",
            "version": self.runtime["lmms_eval"],
            "base": self._base.name,
            "model_args": dict(settings.model_args),
        }

    def noise_cells(self, maker: CellMaker, dtype: str, batch_size: int) -> list[Cell]:
        """Both repetitions; the one that the base cannot do says why."""
        cells = noise_cells(maker, dtype, batch_size)
        for cell in cells:
            why = None
            if cell.entry["batch_size"] != batch_size and not self._base.batches:
                why = f"lmms-eval's {self._base.name} answers one question at a time"
            if cell.entry["dtype"] != dtype and not self._base.takes("dtype"):
                why = f"lmms-eval's {self._base.name} takes no dtype"
            if why is not None:
                cell.entry.update(status="unreachable", reason=why)
        return cells

    # ------------------------------------------------------------------ answers

    def answer(self, sweep: Sweep) -> None:
        cells = [cell for cell in [*sweep.noise, *sweep.main] if cell.runs]
        todo = [(cell, own) for cell in cells if (own := sweep.pending(cell, self.items))]
        if not todo:
            return
        pretrained = self._pretrained()
        self._release(sweep)
        sweep.progress.start("answers", sum(len(own) for _, own in todo))
        reasons = {}
        for number, (cell, own) in enumerate(todo, 1):
            sweep.progress.say(f"{cell.id}: cell {number} of {len(todo)}, {len(own)} questions")
            try:
                self._cell(sweep, cell, own, pretrained)
            except child.ChildFailedError as error:
                reasons[cell.id] = str(error)
                sweep.progress.say(f"{cell.id}: not answered; {error}")
        if reasons:
            name, why = next(iter(reasons.items()))
            first = why.splitlines()[0]
            raise CellsFailedError(
                f"{len(reasons)} of {len(todo)} cells could not be answered "
                f"({', '.join(reasons)}); {name}: {first}, see {LMMS}/{name}/{LOG} in the run "
                "folder. Run the same command again to try them again"
            )

    def _pretrained(self) -> str:
        """What lmms-eval loads: a folder where the model is one, else its name on the hub."""
        home = Path(self._subject.model.name_or_path)
        return str(home.resolve()) if home.is_dir() else str(self._subject.model.name_or_path)

    def _release(self, sweep: Sweep) -> None:
        """Let go of the model that budgets were matched on: the children need its memory."""
        self._subject = dataclasses.replace(
            self._subject,
            model=None,
            processor=None,
            parts=None,  # type: ignore[arg-type]
        )
        sweep.subject, sweep.sample = self._subject, []
        gc.collect()
        if self._subject.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _cell(self, sweep: Sweep, cell: Cell, pending: list[Item], pretrained: str) -> None:
        """One process for the open questions of a cell."""
        folder = sweep.store.folder / LMMS / cell.id
        names = list(dict.fromkeys(item.task for item in pending))
        self._write(sweep, cell, folder, names, pretrained)
        steps = _Steps(sweep, len(pending), sweep.settings.processes)
        child.run_child(
            arguments.command(sweep.settings), folder, folder / LOG,
            arguments.environment(self._subject.device.type, os.environ), steps.seen,
        )  # fmt: skip
        if sweep.code() != sweep.info["code"]:
            # each process reads the sources anew, so its answers may be of either version
            raise ValueError(
                f"the sources of tokprune have changed while {cell.id} was answered; its answers "
                "are left out, and the same command asks everything again"
            )
        missing = self._read(sweep, cell, pending, folder / OUTPUT)
        if missing:
            raise child.ChildFailedError(f"{missing}\n{child.read_tail(folder / LOG)}")
        steps.finish()

    def _write(
        self, sweep: Sweep, cell: Cell, folder: Path, names: list[str], pretrained: str
    ) -> None:
        """A new folder with what the process is told."""
        settings, subject = sweep.settings, self._subject
        told = arguments.model_arguments(settings, self._base, subject, cell, pretrained)
        # groups by their own name as long as all of them is open: then they are aggregated
        every = len(names) == len(self.benchmark.tasks)
        config = arguments.configuration(
            settings, told, self.called if every else names,
            tasks.task_folders(settings.include_path), subject.device.type,
            cell.entry["batch_size"],
        )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        sweep.store.write_json(f"{LMMS}/{cell.id}/{CONFIG}", config)
        setting = arguments.setting_text(cell)
        if setting is not None:
            (folder / SETTING).write_text(setting, encoding="utf-8")

    def _read(self, sweep: Sweep, cell: Cell, pending: list[Item], output: Path) -> str | None:
        """Rows of what was answered; says what was not."""
        now = time.time()
        logged: dict[str, dict[str, dict[str, Any]]] = {}
        rows, lacking = [], dict.fromkeys((item.task for item in pending), 0)
        for item in pending:
            if item.task not in logged:
                logged[item.task] = samples.read_samples(output, item.task)
            sample = logged[item.task].get(item.id)
            if sample is None:
                lacking[item.task] += 1
                continue
            name = sweep.name(cell, item)
            rows.append(samples.sample_row(name, cell.id, item, sample, now))
        if rows:
            known = sweep.store.read_json(METRICS_FILE) or {}
            known[cell.id] = {**known.get(cell.id, {}), **samples.read_metrics(output)}
            sweep.store.write_json(METRICS_FILE, known)
        sweep.add(rows)
        gaps = [f"{task} ({number})" for task, number in lacking.items() if number]
        return f"it logged no answer to questions of {', '.join(gaps)}" if gaps else None

    # ------------------------------------------------------------------ timing

    def time_cells(self, sweep: Sweep) -> dict[str, Any] | None:
        settings, device = sweep.settings, self._subject.device
        if settings.processes > 1 and device.type == "cpu":
            sweep.progress.say("no times: processes that share a processor slow each other down")
            return None
        known = {sweep.name(cell, item) for cell in sweep.main for item in self.items}
        rows = [row for row in scan_rows(sweep.store.rows_path)[0] if row["row"] in known]
        timing = answer_times(sweep.main, rows, machine(device))
        if timing is None:
            sweep.progress.say("no times: lmms-eval's answers were not all timed")
        return timing


class _Steps:
    """Answers of a process as steps of the sweep's progress. Only the first of several processes
    shows a bar, over its own share."""

    def __init__(self, sweep: Sweep, total: int, processes: int) -> None:
        self._sweep, self._total, self._processes = sweep, total, processes
        self._done = 0

    def seen(self, number: int) -> None:
        self._to(min(number * self._processes, self._total))

    def finish(self) -> None:
        self._to(self._total)

    def _to(self, done: int) -> None:
        if done > self._done:
            self._sweep.progress.advance(done - self._done)
            self._done = done
