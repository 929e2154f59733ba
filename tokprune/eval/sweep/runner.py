"""Run a sweep: match budgets, have every trial answer every question, time; resumable at any
moment. Who asks the questions is the harness's business."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from typing import Any

import tokprune
from tokprune.bench.environment import environment
from tokprune.eval.benchmarks.base import evenly_spaced
from tokprune.eval.sweep.budgets import check_budgets
from tokprune.eval.sweep.builtin import sharing
from tokprune.eval.sweep.calibrate import Calibrator
from tokprune.eval.sweep.evaluator import Batch
from tokprune.eval.sweep.gate import gates
from tokprune.eval.sweep.harness import Harness, Job, OpenTrial, Step, open_harness
from tokprune.eval.sweep.identity import code_hash, row_id, runtime
from tokprune.eval.sweep.latency import timed_trials
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.eval.sweep.progress import Progress
from tokprune.eval.sweep.results import LATENCY_FILE, RUN_FILE, Run, read_run
from tokprune.eval.sweep.resume import check_harness, check_same, check_settings, earlier_run
from tokprune.eval.sweep.schema import SCHEMA
from tokprune.eval.sweep.settings import Settings
from tokprune.eval.sweep.store import Store
from tokprune.eval.sweep.trials import Trial, TrialMaker, build_trials


def run_sweep(
    settings: Settings,
    *,
    command: Sequence[str] = (),
    progress: Progress | None = None,
    harness: Harness | None = None,
) -> Run:
    """Answer every question of a benchmark in every trial, and write the run folder.

    A folder that holds a part of the same sweep is completed; methods, budgets and seeds may have
    been added. Interrupted (Ctrl-C, SIGTERM), the run folder is valid and the model unpatched.

    Args:
        settings: what to do.
        command: how this was started, for the record.
        progress: shows how far it is.
        harness: who asks which questions, instead of the one that the settings name.

    Returns:
        The finished run, read back.

    Raises:
        ValueError: unknown method, task, benchmark or split; a budget that is more than an image
            has; a run folder of another model, benchmark or of other settings; a corrupt row.
            Nothing has been answered then.
        OSError: model or run folder cannot be read or written, or the disk is full: what was
            written before is intact.
        TrialsFailedError: lmms-eval failed in some trials, or workers on Ray died of some batches;
            all others have been answered.
        ImportError: Ray is not installed, and the executor is "ray".
        KeyboardInterrupt: after an interruption.
    """
    harness = open_harness(settings) if harness is None else harness
    progress = Progress() if progress is None else progress
    with Store(settings.out, settings.fresh) as store, interruptible(), progress:
        sweep = Sweep(settings, harness, store, progress)
        sweep.prepare(command)
        try:
            sweep.run()
        finally:
            sweep.save()
    return read_run(settings.out)


@contextmanager
def interruptible() -> Iterator[None]:
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
    """One call of :func:`run_sweep`. It alone writes the run folder."""

    #: run.json
    info: dict[str, Any]
    loaded: LoadedModel
    #: what is compared, and repetitions of the unpruned model
    main: list[Trial]
    noise: list[Trial]
    #: batches of one item that budgets were matched on
    sample: list[Batch]

    def __init__(
        self, settings: Settings, harness: Harness, store: Store, progress: Progress
    ) -> None:
        self.settings, self.harness = settings, harness
        self.items, self.store, self.progress = harness.items, store, progress
        #: identities of the rows that are there, and what they say that they answer
        self.done = {row["row"]: _answered(row) for row in store.rows}
        #: seconds that the answers took
        self.answering = _seconds(store.rows)
        self.failed = 0

    # ------------------------------------------------------------------ before

    def prepare(self, command: Sequence[str]) -> None:
        """Load the model, match the budgets, write run.json."""
        settings, folder = self.settings, self.store.folder
        earlier = earlier_run(folder, len(self.store.rows))
        entries: dict[str, Any] = {"benchmark": self._benchmark_entry()}
        if earlier is not None:
            # of one benchmark, other tasks and limits have other versions
            if earlier["benchmark"]["name"] == entries["benchmark"]["name"]:
                check_settings(earlier, settings, folder)
            check_same(earlier, entries, folder)
        self.loaded = LoadedModel.load(
            settings.model, settings.dtype, settings.device, settings.trust_remote_code
        )
        harness = self.harness.check_compatible(self.loaded, settings)
        entries["model"] = self.loaded.describe()
        if earlier is not None:
            check_harness(earlier, harness, folder)
            check_same(earlier, entries, folder)
        if harness is not None:
            entries["harness"] = harness
        self.info = {
            "schema": SCHEMA,
            "created": now() if earlier is None else earlier["created"],
            "updated": now(),
            "finished": False,
            "command": shlex.join(command),
            "tokprune": tokprune.__version__,
            "code": self.code(),
            "environment": environment(self.loaded.device),
            "settings": self._settings_entry(earlier),
            **entries,
            "trials": [],
        }
        for note in self.harness.benchmark.notes:
            self.progress.say(note)
        self._find_trials(earlier)
        self.save()

    def code(self) -> str:
        """Hash of the code and versions that answer, as they are now."""
        return code_hash({**runtime(self.loaded.device), **self.harness.runtime})

    def _benchmark_entry(self) -> dict[str, Any]:
        benchmark = self.harness.benchmark
        present = {item.task for item in self.items}
        media = {} if benchmark.media == "image" else {"media": benchmark.media}
        return {
            "name": benchmark.name,
            **media,
            "version": benchmark.version_of(self.items),
            **({} if benchmark.shape is None else {"shape": benchmark.shape}),
            "scoring": benchmark.scoring,
            "split": self.harness.split,
            "tasks": [task for task in benchmark.tasks if task in present],
            "groups": {name: list(tasks) for name, tasks in benchmark.groups.items()},
            "headline": [task for task in benchmark.headline if task in present],
            "items": len(self.items),
        }

    def _settings_entry(self, earlier: dict[str, Any] | None) -> dict[str, Any]:
        """Settings as they are, with the methods, budgets and seeds of earlier calls."""
        entry = self.settings.to_dict()
        entry["methods"] = [
            {"name": variant.method or variant.unpatched, **variant.options}
            if variant.options
            else variant.name
            for variant in self.settings.compared(self.harness.benchmark.media)
        ]
        entry["dtype"] = self.loaded.dtype
        entry["fresh"] = False
        if earlier is not None:
            for name in ("methods", "keep", "seeds"):
                before = list(earlier["settings"].get(name, []))
                entry[name] = before + [value for value in entry[name] if value not in before]
        return entry

    def _find_trials(self, earlier: dict[str, Any] | None) -> None:
        """The trials of this sweep, and those that the folder has from earlier calls."""
        settings = self.settings
        known: dict[str, Trial] = {}
        if earlier is not None:
            known = {entry["trial"]: self._stored(entry) for entry in earlier["trials"]}
        unchanged = earlier is not None and earlier["code"] == self.info["code"]
        if earlier is not None and not unchanged and self.done:
            self.progress.say(
                "code or libraries have changed since this run folder was written: its "
                f"{len(self.done)} rows are kept in the file, but every question is asked again"
            )
        batch = self._sample()
        common = {
            "match": settings.match,
            "dtype": self.loaded.dtype,
            "batch_size": settings.batch_size,
        }
        variants = settings.compared(self.harness.benchmark.media)
        self.progress.start("matching budgets", len(variants))
        with sharing(self.loaded, settings) as shared:
            if shared is not None:
                shared.remember(batch.pixels)
            calibrator = Calibrator(self.loaded, batch, settings.match)
            check_budgets(settings.budgets(), calibrator.most)
            maker = TrialMaker(calibrator, common)
            usable = known if unchanged else {}
            trials: list[Trial] = []
            for variant in variants:
                trials += build_trials(maker, variant, settings.budgets(), settings.seeds, usable)
                self.progress.advance(1)
        new = {trial.id: trial for trial in trials}
        self.main = [
            new.pop(name, trial) for name, trial in known.items() if not trial.entry["noise"]
        ]
        self.main += new.values()
        self.noise = [trial for trial in known.values() if trial.entry["noise"]]
        if settings.noise:
            made = self.harness.noise_trials(maker, self.loaded.dtype, settings.batch_size)
            self.noise = list({trial.id: trial for trial in [*self.noise, *made]}.values())
        for trial in self.main:
            if trial.entry["reason"] is not None:
                what = "" if trial.runs else "not run; "
                self.progress.say(f"{trial.id}: {what}{trial.entry['reason']}")

    def _stored(self, entry: dict[str, Any]) -> Trial:
        try:
            return Trial.stored(entry)
        except ValueError as error:
            raise ValueError(
                f"run folder {self.store.folder}: trial {entry['trial']} is not possible any more "
                f"({error}); choose another --out, or start over with --fresh"
            ) from None

    def _sample(self) -> Batch:
        """Items for matching budgets, and the first of them for timing: evenly spaced over all,
        those with unreadable images left out."""
        wanted, benchmark = self.settings.calibrate, self.harness.benchmark
        readable: dict[str, Batch] = {}
        # where many items have no image, a denser choice finds some
        for number in (wanted, 8 * wanted):
            for item in evenly_spaced(self.items, number):
                single = Batch(self.loaded, benchmark, [item])
                if len(readable) < wanted and item.id not in readable and single.pixels is not None:
                    readable[item.id] = single
        if not readable:
            _ = Batch(self.loaded, benchmark, self.items[:1]).inputs  # raises what is wrong
        self.sample = list(readable.values())
        return Batch(self.loaded, benchmark, [one.items[0] for one in self.sample])

    # ------------------------------------------------------------------ run

    def run(self) -> None:
        """Answer what is open, then time the trials."""
        job = Job(self.settings, self.loaded, self.store.folder, self._open_trials(), self.sample)
        total = len(job.trials) * len(self.items)
        missing = sum(len(task.rows) for task in job.trials)
        if missing < total:
            self.progress.say(f"{total - missing} of {total} answers are there already")
        if missing and self.harness.own_processes:
            self.loaded = job.loaded = self.loaded.released()
            self.sample = job.sample = [
                Batch(self.loaded, one.benchmark, one.items) for one in self.sample
            ]
        with closing(self.harness.answer(job)) as steps:
            for step in steps:
                self.write(step)
        if self.failed:
            self.progress.say(f"{self.failed} questions failed; they count as incorrect")
        if self.settings.latency:
            self._time(job)
        self.info["finished"] = all(
            self.done.keys() >= set(task.rows.values()) for task in job.trials if task.trial.runs
        )
        self._judge()

    def _open_trials(self) -> list[OpenTrial]:
        """The trials that can be run, with the rows that they lack."""
        found = []
        items = [(item.id, item.task) for item in self.items]
        for trial in [*self.noise, *self.main]:
            if trial.runs:
                names = {item: row_id(self.info, trial.entry, item, task) for item, task in items}
                # a row with the right identity and another item is damaged
                rows = {
                    item: names[item]
                    for item, task in items
                    if self.done.get(names[item]) != (trial.id, item, task)
                }
                found.append(OpenTrial(trial, rows))
        return found

    def write(self, step: Step) -> None:
        """Write what a harness has done, rows all or none, and count it."""
        if step.rows and self.harness.rereads_sources and self.code() != self.info["code"]:
            # each process reads the sources anew, so its answers may be of either version
            raise ValueError(
                f"the sources of tokprune have changed while {step.rows[0]['trial']} was answered; "
                "its answers are left out, and the same command asks everything again"
            )
        if step.note is not None:
            self.progress.say(step.note)
        if step.stage is not None:
            self.progress.start(*step.stage)
        for name, value in step.files.items():
            self.store.write_json(name, value)
        if step.rows:
            self.store.append(step.rows)
            self.done.update((row["row"], _answered(row)) for row in step.rows)
            self.answering += _seconds(step.rows)
            self.failed += sum(row["status"] == "failed" for row in step.rows)
        if done := len(step.rows) if step.done is None else step.done:
            self.progress.advance(done)

    def _time(self, job: Job) -> None:
        """Write latency.json, unless it is there already for these trials and this code."""
        before = self.store.read_json(LATENCY_FILE) or {}
        names = {trial.id for trial in timed_trials(self.main)}
        if before.get("code") == self.info["code"] and set(before.get("trials", ())) == names:
            return
        rounds: int | None = None

        def progress(done: int, total: int) -> None:
            nonlocal rounds
            if rounds is None:
                self.progress.start("timing", total)
            self.progress.advance(done - (rounds or 0))
            rounds = done

        job.answering = self.answering
        timing = self.harness.time_trials(job, progress)
        if isinstance(timing, str):
            self.progress.say(f"no times: {timing}")
        else:
            self.store.write_json(LATENCY_FILE, {**timing, "code": self.info["code"]})

    def _judge(self) -> None:
        """Write into every trial whether its method can be seen to have acted."""
        self.save()
        run = read_run(self.store.folder)
        found = gates(run.info["trials"], run.rows)
        for trial in [*self.noise, *self.main]:
            trial.entry.pop("gate", None)  # of an earlier call
            if (gate := found.get(trial.id)) is not None:
                trial.entry["gate"] = gate.to_dict()

    # ------------------------------------------------------------------ record

    def save(self) -> None:
        """Write run.json."""
        self.info["updated"] = now()
        self.info["trials"] = [trial.entry for trial in [*self.noise, *self.main]]
        self.store.write_json(RUN_FILE, self.info)


def _answered(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["trial"], row["item"], row["task"]


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(row["seconds"] or 0.0 for row in rows)


def now() -> str:
    """The time as run.json has it: ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
