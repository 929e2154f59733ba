"""Answer trials in this process: one model, all trials on a batch while its pixels are at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from tokprune.engine.shared_encoder import SharedEncoder
from tokprune.eval.benchmarks import load_benchmark
from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.sweep.evaluator import Batch, Evaluator, numbers_of
from tokprune.eval.sweep.harness import Job, OpenTrial, Step
from tokprune.eval.sweep.latency import measure_latency, timed_trials
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.eval.sweep.overlays import gallery_items, gallery_trials, overlay_name
from tokprune.eval.sweep.results import OVERLAYS
from tokprune.eval.sweep.schema import make_row
from tokprune.eval.sweep.settings import Settings
from tokprune.eval.sweep.trials import Trial, TrialMaker
from tokprune.inputs.frames_processor import FramesProcessor


@dataclass
class BuiltinHarness:
    """The sweep's own way of asking; see :class:`tokprune.eval.sweep.harness.Harness`."""

    benchmark: Benchmark
    items: Sequence[Item]
    split: str | None
    runtime: dict[str, str] = field(default_factory=dict)
    own_processes: bool = False

    @classmethod
    def open(cls, settings: Settings) -> BuiltinHarness:
        """Load the benchmark.

        Raises:
            ValueError, OSError: no such benchmark, task or split, or no item of it.
        """
        benchmark = load_benchmark(settings.benchmark, lazy=True, **settings.file_options())
        tasks = None if settings.tasks is None else list(settings.tasks)
        items = benchmark.items(settings.split, tasks, settings.limit)
        if not items:
            raise ValueError(f"benchmark {benchmark.name}: no item matches split, tasks and limit")
        if settings.max_new_tokens is not None:
            benchmark.max_new_tokens = settings.max_new_tokens
        return cls(benchmark, items, settings.split or next(iter(benchmark.splits), None))

    def check_compatible(self, loaded: LoadedModel, settings: Settings) -> None:
        if self.benchmark.media == "video" and not loaded.facts.videos:
            raise ValueError(
                f"benchmark {self.benchmark.name} asks about videos, and model {loaded.name} "
                f"({type(loaded.model).__name__}) takes images only; it should be a "
                "LLaVA-NeXT-Video or LLaVA-OneVision"
            )
        if self.benchmark.media == "image" and isinstance(loaded.processor, FramesProcessor):
            raise ValueError(
                f"benchmark {self.benchmark.name} asks about images, which model {loaded.name} "
                "takes where torchvision is installed only; a benchmark of videos does without"
            )

    def noise_trials(self, maker: TrialMaker, dtype: str, batch_size: int) -> list[Trial]:
        return maker.noise(dtype, batch_size)

    # ------------------------------------------------------------------ answers

    def answer(self, job: Job) -> Generator[Step, None, None]:
        for task in job.trials:
            if task.trial.entry["noise"] and task.rows:
                yield from self._repeat(job, task)
        main = [task for task in job.trials if not task.trial.entry["noise"]]
        if any(task.rows for task in main):
            yield from self._together(job, main)

    def _repeat(self, job: Job, task: OpenTrial) -> Iterator[Step]:
        """A repetition of the unpruned model, with batches of its own."""
        entry, loaded = task.trial.entry, job.loaded
        if entry["dtype"] != loaded.dtype:
            try:
                loaded = LoadedModel.load(
                    job.settings.model, entry["dtype"], loaded.device.type,
                    job.settings.trust_remote_code,
                )  # fmt: skip
            except (MemoryError, RuntimeError) as error:
                entry["status"] = "unreachable"
                entry["reason"] = f"no room for a second copy: {' '.join(str(error).split())}"
                yield Step(note=f"{task.trial.id}: not run; {entry['reason']}")
                return
        yield Step(stage=(f"noise floor, {task.trial.id}", len(task.rows)))
        evaluator = Evaluator(loaded, self.benchmark)
        for items in chunks(self.items, entry["batch_size"]):
            if _open(task, items):
                yield self.evaluate(evaluator, task, Batch(loaded, self.benchmark, items))

    def _together(self, job: Job, main: list[OpenTrial]) -> Iterator[Step]:
        """All trials on a batch before the next batch."""
        trials = [task.trial for task in main]
        tower = job.loaded.facts.tower
        if tower is None or self.benchmark.media == "video":
            tokens = next(trial.entry["budget"] for trial in trials if trial.id == "none")
        else:
            tokens = tower.patches
        gallery = gallery_items(self.items), gallery_trials(trials, tokens)
        evaluator = Evaluator(job.loaded, self.benchmark, gallery)
        yield Step(stage=("answers", sum(len(task.rows) for task in main)))
        with sharing(job.loaded, job.settings) as shared:
            for items in chunks(self.items, job.settings.batch_size):
                unanswered = [task for task in main if _open(task, items)]
                if not unanswered:
                    continue
                batch = Batch(job.loaded, self.benchmark, items)
                if shared is not None:
                    shared.remember(batch.pixels)
                for task in unanswered:
                    yield self.evaluate(evaluator, task, batch)

    def evaluate(self, evaluator: Evaluator, task: OpenTrial, batch: Batch) -> Step:
        """One trial on one batch. All its questions run, so that the batch is the one it was before
        an interruption; the rows that are missing are written."""
        rows, files, now = [], {}, time.time()
        outcomes = evaluator.evaluate(task.trial, batch)
        for item, outcome in zip(batch.items, outcomes, strict=True):
            if item.id not in task.rows:
                continue
            if outcome.overlay is not None:
                files[f"{OVERLAYS}/{overlay_name(item.id, task.trial.id)}"] = outcome.overlay
            text = "" if outcome.answer is None else outcome.answer.text
            score = 0.0 if outcome.error else float(self.benchmark.score(item, text))
            rows.append(make_row(
                task.rows[item.id], task.trial.id, item, text, score, outcome.error,
                numbers_of(outcome), now,
            ))  # fmt: skip
        return Step(rows, files)

    # ------------------------------------------------------------------ timing

    def time_trials(self, job: Job, progress: Callable[[int, int], None]) -> dict[str, Any]:
        trials, question = timed_trials([task.trial for task in job.trials]), job.sample[0]
        return measure_latency(
            job.loaded, question.inputs, trials, job.settings.latency_rounds,
            self.benchmark.max_new_tokens, progress,
            {t.id: question.inputs_for(t) for t in trials if t.reduced_input is not None},
            job.answering,
        )  # fmt: skip


def sharing(
    loaded: LoadedModel, settings: Settings
) -> AbstractContextManager[SharedEncoder | None]:
    """The encoder runs once for trials that leave it alone, where the settings say so."""
    return SharedEncoder(loaded) if settings.share else nullcontext()


def _open(task: OpenTrial, items: Sequence[Item]) -> bool:
    return any(item.id in task.rows for item in items)


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Items in batches of ``size``, the last one of what is left."""
    return [items[i : i + size] for i in range(0, len(items), size)]
