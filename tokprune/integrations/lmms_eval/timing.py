"""Times of a sweep through lmms-eval: medians over the answers themselves."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tokprune.bench.clock import Spread
from tokprune.eval.sweep.latency import timed_trials
from tokprune.eval.sweep.trials import Trial

#: parts of latency.json and the fields of a row that they come from
_PARTS = {"prefill": "prefill_seconds", "total": "seconds"}
HOW = (
    "over the answers that lmms-eval asked for, trials one after another, each in a process "
    "of its own"
)


def answer_times(
    trials: Sequence[Trial], rows: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The object of latency.json, None where an answer was not timed."""
    timed = [trial.id for trial in timed_trials(trials)]
    found: dict[str, list[Mapping[str, Any]]] = {name: [] for name in timed}
    for row in rows:
        if row["trial"] in found and row["status"] == "ok":
            found[row["trial"]].append(row)
    times: dict[str, dict[str, Any]] = {}
    for name, answers in found.items():
        values: dict[str, list[Any]] = {
            part: [answer.get(field) for answer in answers] for part, field in _PARTS.items()
        }
        if not answers or any(None in seconds for seconds in values.values()):
            return None
        times[name] = {part: Spread.of(seconds).to_dict() for part, seconds in values.items()}
    if not times:
        return None
    unpruned = found.get("none") or next(iter(found.values()))
    return {
        "environment": dict(environment),
        "clock": "wall",
        "how": HOW,
        "batch_size": trials[0].entry["batch_size"],
        "prompt_tokens": round(statistics.median(row["prompt_tokens"] for row in unpruned)),
        "new_tokens": round(statistics.median(row["new_tokens"] for row in unpruned)),
        "trials": times,
    }
