"""Answer trials through lmms-eval: one process for each, whose samples become rows."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokprune.bench import environment as machine
from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.sweep.harness import Job, OpenTrial, Step, TrialsFailedError
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.eval.sweep.results import LMMS, METRICS_FILE, read_object, read_run
from tokprune.eval.sweep.settings import Settings
from tokprune.eval.sweep.trials import Trial, TrialMaker
from tokprune.integrations.lmms_eval import child, samples
from tokprune.integrations.lmms_eval.arguments import (
    SETTING,
    join,
    model_arguments,
    read_arguments,
    setting_text,
)
from tokprune.integrations.lmms_eval.benchmark import LmmsBenchmark
from tokprune.integrations.lmms_eval.child import CONFIG, LOG, OUTPUT
from tokprune.integrations.lmms_eval.tasks.loading import lmms_version, load_tasks, task_folders
from tokprune.integrations.lmms_eval.timing import answer_times
from tokprune.integrations.lmms_eval.wrapped import (
    BASES,
    DTYPES,
    Base,
    fit_processor,
    parameters,
)


@dataclass
class LmmsHarness:
    """lmms-eval as the one who asks; see :class:`tokprune.eval.sweep.harness.Harness`."""

    benchmark: Benchmark
    items: list[Item]
    #: names that make lmms-eval run all tasks, groups and tags among them
    called: tuple[str, ...]
    runtime: dict[str, str]
    split: str | None = None
    own_processes: bool = True
    rereads_sources: bool = True
    _base: Base = field(init=False)
    #: what lmms-eval loads: a folder where the model is one, else its name on the hub
    _pretrained: str = field(init=False)

    @classmethod
    def open(cls, settings: Settings) -> LmmsHarness:
        """Load the tasks.

        Raises:
            ValueError: lmms-eval is not installed, an unknown task or base, or no document.
        """
        version = lmms_version()
        if settings.base is not None:
            check_base(settings.base, settings)
        assert settings.tasks is not None
        loaded = load_tasks(settings.tasks, settings.include_path)
        benchmark = LmmsBenchmark(loaded)
        items = benchmark.items(limit=settings.limit)
        if not items:
            raise ValueError(f"tasks {', '.join(settings.tasks)}: hold no document")
        return cls(benchmark, items, loaded.called, {"lmms_eval": version})

    def check_compatible(self, loaded: LoadedModel, settings: Settings) -> dict[str, Any]:
        self._base = find_base(settings, loaded)
        check_dtype(self._base, settings.dtype, loaded.dtype)
        # budgets are matched on images as large as the base shows them
        fit_processor(loaded.processor, self._base, settings.model_args)
        home = Path(loaded.model.name_or_path)
        self._pretrained = str(home.resolve()) if home.is_dir() else str(loaded.model.name_or_path)
        return {
            "name": "lmms-eval",
            "version": self.runtime["lmms_eval"],
            "base": self._base.name,
            "model_args": dict(settings.model_args),
        }

    def noise_trials(self, maker: TrialMaker, dtype: str, batch_size: int) -> list[Trial]:
        """Both repetitions; the one that the base cannot do says why."""
        trials = maker.noise(dtype, batch_size)
        for trial in trials:
            why = None
            if trial.entry["batch_size"] != batch_size and not self._base.batches:
                why = f"lmms-eval's {self._base.name} answers one question at a time"
            if trial.entry["dtype"] != dtype and not self._base.takes("dtype"):
                why = f"lmms-eval's {self._base.name} takes no dtype"
            if why is not None:
                trial.entry.update(status="unreachable", reason=why)
        return trials

    # ------------------------------------------------------------------ answers

    def answer(self, job: Job) -> Generator[Step, None, None]:
        unanswered = [task for task in job.trials if task.rows]
        yield Step(stage=("answers", sum(len(task.rows) for task in unanswered)))
        reasons = {}
        for number, task in enumerate(unanswered, 1):
            name = task.trial.id
            yield Step(
                note=f"{name}: trial {number} of {len(unanswered)}, {len(task.rows)} questions"
            )
            try:
                yield from self._answer(job, task)
            except child.ChildFailedError as error:
                reasons[name] = str(error)
                yield Step(note=f"{name}: not answered; {error}")
        if reasons:
            name, why = next(iter(reasons.items()))
            raise TrialsFailedError(
                f"{len(reasons)} of {len(unanswered)} trials could not be answered "
                f"({', '.join(reasons)}); {name}: {why.splitlines()[0]}, see {LMMS}/{name}/{LOG} "
                "in the run folder. Run the same command again to try them again"
            )

    def _answer(self, job: Job, task: OpenTrial) -> Iterator[Step]:
        """One process for the open questions of a trial. Of several that it may consist of, only
        the first shows a bar, over its own share."""
        items = [item for item in self.items if item.id in task.rows]
        folder = job.folder / LMMS / task.trial.id
        files = self._inputs(job, task.trial, list(dict.fromkeys(item.task for item in items)))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        done = 0
        environment = {**os.environ, **child.environment(job.loaded.device.type)}
        command = child.command(job.settings)
        with closing(child.run_child(command, folder, environment)) as numbers:
            for number in numbers:
                seen = max(done, min(number * job.settings.processes, len(items)))
                yield Step(done=seen - done)
                done = seen
        rows, missing = self._read(task, items, folder / OUTPUT)
        metrics = job.folder / METRICS_FILE
        every = read_object(metrics) if metrics.is_file() else {}
        if rows:
            new = samples.read_metrics(folder / OUTPUT)
            every[task.trial.id] = {**every.get(task.trial.id, {}), **new}
        yield Step(rows, {METRICS_FILE: every} if rows else {}, done=0)
        if missing:
            raise child.ChildFailedError(
                f"it logged no answer to questions of {missing}\n{child.read_tail(folder / LOG)}"
            )
        yield Step(done=len(items) - done)

    def _inputs(self, job: Job, trial: Trial, names: list[str]) -> dict[str, str]:
        """The files that the process reads."""
        settings, device = job.settings, job.loaded.device.type
        # groups by their own name as long as all of them is open: then they are aggregated
        every = len(names) == len(self.benchmark.tasks)
        config = child.configuration(
            settings, model_arguments(settings, self._base, trial, self._pretrained, device),
            self.called if every else names, task_folders(settings.include_path), device,
            trial.entry["batch_size"],
        )  # fmt: skip
        setting = setting_text(trial)
        return {CONFIG: config} if setting is None else {CONFIG: config, SETTING: setting}

    def _read(
        self, task: OpenTrial, items: list[Item], output: Path
    ) -> tuple[list[dict[str, Any]], str]:
        """Rows of what was answered, and tasks that lack some, with their number."""
        now = time.time()
        logged = {name: samples.read_samples(output, name) for name in {i.task for i in items}}
        rows, lacking = [], dict.fromkeys((item.task for item in items), 0)
        for item in items:
            sample = logged[item.task].get(item.id)
            if sample is None:
                lacking[item.task] += 1
                continue
            row = task.rows[item.id]
            rows.append(samples.sample_row(row, task.trial.id, item, sample, now))
        return rows, ", ".join(f"{task} ({number})" for task, number in lacking.items() if number)

    # ------------------------------------------------------------------ timing

    def time_trials(self, job: Job, progress: Callable[[int, int], None]) -> dict[str, Any] | str:
        if job.settings.processes > 1 and job.loaded.device.type == "cpu":
            return "processes that share a processor slow each other down"
        trials = [task.trial for task in job.trials if not task.trial.entry["noise"]]
        timing = answer_times(
            trials, read_run(job.folder).rows, machine.environment(job.loaded.device)
        )
        return timing or "lmms-eval's answers were not all timed"


def find_base(settings: Settings, loaded: LoadedModel) -> Base:
    """The base that the settings name, or the one for the model's family.

    Raises:
        ValueError: see :func:`check_base`, or a family without a usual base.
    """
    name = settings.base or BASES.get(loaded.family.name)
    if name is None:
        raise ValueError(
            f"base is missing: no lmms-eval model is known for family {loaded.family.name}; "
            "'lmms-eval models' lists what there is"
        )
    return check_base(name, settings)


def check_base(name: str, settings: Settings) -> Base:
    """A base by name, and whether it takes the arguments and the batch size.

    Raises:
        ValueError: unknown base or argument (names the nearest), one that cannot be imported, or a
            batch size that it cannot do.
    """
    base = Base(name, base_parameters(name, settings.model_args))
    if settings.batch_size > 1 and not base.batches:
        raise ValueError(
            f"batch_size={settings.batch_size}: lmms-eval's {name} answers one question at a time"
        )
    return base


def check_dtype(base: Base, asked: str, loaded: str) -> None:
    """Whether the base runs the model in this dtype.

    Raises:
        ValueError: it takes no dtype, and has another.
    """
    own = DTYPES.get(base.name)
    if not base.takes("dtype") and (asked not in ("auto", own) or loaded != (own or loaded)):
        raise ValueError(
            f"dtype={asked}: lmms-eval's {base.name} takes none, and loads its model "
            + (f"in {own}; give dtype={own}" if own else "as the checkpoint says; leave dtype out")
        )


def base_parameters(name: str, model_args: Mapping[str, Any]) -> frozenset[str]:
    """Names of the arguments of an lmms-eval model; the plug-in's own reader checks it and
    ``model_args``."""
    try:
        read = read_arguments(join({"base": name, **model_args}))
    except ImportError as error:
        raise ValueError(f"base={name!r} cannot be used: {error}") from error
    return frozenset(parameters(read.base_class)[0])
