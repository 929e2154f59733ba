"""One trial on one batch of questions: the unit in which answers are made, written and lost."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.sweep.evaluator import Batch, Evaluator, numbers_of
from tokprune.eval.sweep.harness import OpenTrial, Step
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.eval.sweep.overlays import gallery_items, gallery_trials, overlay_name
from tokprune.eval.sweep.results import OVERLAYS
from tokprune.eval.sweep.schema import make_row
from tokprune.eval.sweep.settings import Settings
from tokprune.eval.sweep.trials import Trial


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """The batches of a trial; always these, whatever is answered already, since padding and with
    it the last bits of an answer depend on the batch."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def is_open(task: OpenTrial, items: Sequence[Item]) -> bool:
    """Whether an answer to these items is missing."""
    return any(item.id in task.rows for item in items)


def answer_batch(evaluator: Evaluator, task: OpenTrial, batch: Batch) -> Step:
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
        score = 0.0 if outcome.error else float(evaluator.benchmark.score(item, text))
        rows.append(make_row(
            task.rows[item.id], task.trial.id, item, text, score, outcome.error,
            numbers_of(outcome), now,
        ))  # fmt: skip
    return Step(rows, files)


def gallery_of(
    trials: Sequence[Trial], loaded: LoadedModel, benchmark: Benchmark, items: Sequence[Item]
) -> tuple[set[str], set[str]]:
    """Ids of the items and of the trials whose overlays are recorded."""
    tower = loaded.facts.tower
    if tower is None or benchmark.media == "video":
        tokens = next(trial.entry["budget"] for trial in trials if trial.id == "none")
    else:
        tokens = tower.patches
    return gallery_items(items), gallery_trials(trials, tokens)


class NoRoomError(RuntimeError):
    """A device has no room for a second copy of the model."""


def second_copy(loaded: LoadedModel, settings: Settings, dtype: str) -> LoadedModel:
    """The model in another dtype, for the noise floor.

    Raises:
        NoRoomError: it does not fit beside the first.
    """
    try:
        return LoadedModel.load(
            settings.model, dtype, loaded.device.type, settings.trust_remote_code
        )
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise NoRoomError(f"no room for a second copy: {text}") from error


def unreachable(trial: Trial, error: NoRoomError) -> Step:
    """Put down that a trial cannot be run, and say so."""
    trial.entry["status"] = "unreachable"
    trial.entry["reason"] = str(error)
    return Step(note=f"{trial.id}: not run; {error}")
