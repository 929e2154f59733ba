"""Time every trial at the end of a sweep, in turns, on one question."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokprune.bench.clock import Spread
from tokprune.bench.environment import environment
from tokprune.bench.measure import PARTS, measure_trials
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.eval.sweep.trials import Trial

#: measurements of each part in a sweep that answers many questions
ROUNDS = 5


def timed_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that have a time of their own: ``none``, those with a method, and smaller images
    or shorter videos where they have fewer tokens."""
    full = next((c.entry["calibrated"]["tokens_mean"] for c in trials if c.id == "none"), math.inf)
    return [
        trial
        for trial in trials
        if trial.runs
        and not trial.entry["noise"]
        and trial.entry["variant"] != "blind"
        and (trial.reduced_input is None or trial.entry["calibrated"]["tokens_mean"] < full)
    ]


def measure_latency(
    loaded: LoadedModel,
    inputs: Any,
    trials: Sequence[Trial],
    rounds: int | None,
    max_new_tokens: int,
    progress: Callable[[int, int], None] | None = None,
    own_inputs: Mapping[str, Any] | None = None,
    answering: float = math.inf,
) -> dict[str, Any]:
    """The object of latency.json, all trials interleaved.

    Args:
        inputs: a batch of one question.
        trials: those of :func:`timed_trials`.
        rounds: measurements of each part; None: at most :data:`ROUNDS`, and no more once they have
            taken as long as ``answering``.
        progress: called with (rounds done, rounds).
        own_inputs: the same question with other images or frames, by trial id.
        answering: seconds that the answers of the sweep took.
    """
    start = time.monotonic()
    enough = None if rounds is not None else lambda: time.monotonic() - start >= answering
    times = measure_trials(
        loaded.model, inputs, {trial.id: trial.method for trial in trials},
        rounds=ROUNDS if rounds is None else rounds, max_new_tokens=max_new_tokens,
        progress=progress, own_inputs=own_inputs, enough=enough,
    )  # fmt: skip
    return {
        "environment": environment(loaded.device),
        "clock": "wall",
        "batch_size": len(inputs["input_ids"]),
        "prompt_tokens": int(inputs["attention_mask"].sum()) // len(inputs["input_ids"]),
        "new_tokens": max_new_tokens,
        "trials": {
            name: {
                part: Spread.of(seconds[part]).to_dict() if seconds.get(part) else None
                for part in PARTS
            }
            for name, seconds in times.items()
        },
    }
