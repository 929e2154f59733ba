"""Who puts the questions to the model: the sweep itself, or lmms-eval. What it is handed, and what
it hands back for the runner to write."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.sweep.evaluator import Batch
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.eval.sweep.settings import Settings
from tokprune.eval.sweep.trials import Trial, TrialMaker
from tokprune.plugins import plugins


@dataclass(frozen=True)
class OpenTrial:
    """A trial and what it has not answered."""

    trial: Trial
    #: identity of the missing rows, by item id
    rows: Mapping[str, str]


@dataclass
class Job:
    """What a harness is handed."""

    settings: Settings
    loaded: LoadedModel
    #: the run folder, for what a harness needs beside its rows
    folder: Path
    #: all that can be run, repetitions for the noise floor first
    trials: list[OpenTrial]
    #: batches of one item that budgets were matched on; without inputs where the model is released
    sample: list[Batch] = field(default_factory=list)
    #: seconds that all answers took together
    answering: float = 0.0


@dataclass(frozen=True)
class Step:
    """What a harness has done since the step before."""

    #: lines of rows.jsonl, written all or none
    rows: Sequence[dict[str, Any]] = ()
    #: further files by their path in the run folder, JSON objects, written before the rows
    files: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    #: answers that count as progress; None: as many as there are rows
    done: int | None = None
    #: a stage of so many answers begins
    stage: tuple[str, int] | None = None
    #: a line for the user
    note: str | None = None


class Harness(Protocol):
    """A way to get the trials of a sweep answered."""

    #: what the questions are
    benchmark: Benchmark
    items: Sequence[Item]
    #: name for run.json
    split: str | None
    #: versions beside torch's and transformers' that can change an answer
    runtime: dict[str, str]
    #: answers come from other processes, which load the model themselves: this one lets go of it
    own_processes: bool
    #: these processes start anew and again, and read the sources as they are then
    rereads_sources: bool

    def check_compatible(self, loaded: LoadedModel, settings: Settings) -> dict[str, Any] | None:
        """Check the settings against the model. Returns the ``harness`` entry of run.json, None
        for the builtin harness.

        Raises:
            ValueError: they do not fit each other.
        """

    def noise_trials(self, maker: TrialMaker, dtype: str, batch_size: int) -> list[Trial]:
        """Repetitions of the unpruned model that are possible here."""

    def answer(self, job: Job) -> Generator[Step, None, None]:
        """Answer what is open in all trials.

        Raises:
            TrialsFailedError: some trials could not be answered; all others have been.
        """

    def time_trials(self, job: Job, progress: Callable[[int, int], None]) -> dict[str, Any] | str:
        """The object of latency.json, or why there is none. ``progress``: called with (rounds
        done, rounds)."""


class TrialsFailedError(RuntimeError):
    """Some trials of a sweep have no answers; says which, and why."""


def open_harness(settings: Settings) -> Harness:
    """The harness that the settings name, with its benchmark loaded.

    Raises:
        ValueError: unknown benchmark, task or split, no item, or lmms-eval is not installed.
        ImportError: Ray is not installed, and the executor is "ray".
        OSError: unreadable files.
    """
    if settings.executor == "ray":
        from tokprune.eval.sweep.on_ray.harness import RayHarness

        return RayHarness.open(settings)
    if settings.harness == "builtin":
        from tokprune.eval.sweep.builtin import BuiltinHarness

        return BuiltinHarness.open(settings)
    found = {name: harness for name, harness, _ in plugins("harnesses")}
    if settings.harness not in found:  # a broken package; the warning has said why
        raise ValueError(f"harness={settings.harness!r} cannot be loaded")
    harness: Harness = found[settings.harness].open(settings)
    return harness
