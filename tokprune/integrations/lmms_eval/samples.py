"""What lmms-eval has written for a trial: a row for each document, and its own metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokprune.eval.benchmarks.base import Item
from tokprune.eval.sweep.schema import make_row
from tokprune.integrations.lmms_eval.benchmark import item_id
from tokprune.integrations.lmms_eval.tasks.scores import score

#: numbers of a row that the plug-in measures: whole ones, others with the digits kept
_WHOLE = (
    "tokens_in", "macs", "macs_unpruned", "kv_bytes", "kv_bytes_unpruned", "prompt_tokens",
)  # fmt: skip
_REAL = {"tokens_last": 4, "tokens_mean": 4, "seconds": 6, "prefill_seconds": 6}


def read_samples(folder: Path, task: str) -> dict[str, dict[str, Any]]:
    """Logged samples of a task by item id, from the newest file of it; empty without one.

    A task with several filters logs a document once for each; the first is taken.

    Raises:
        ValueError: a line is not JSON; names file and line.
    """
    files = [
        path
        for path in folder.rglob(f"*_samples_{task}.jsonl")
        # the time before the name holds no underscore beside those in a date
        if path.name.split("_samples_", 1)[1] == f"{task}.jsonl"
    ]
    if not files:
        return {}
    path = max(files, key=lambda found: found.name)
    samples: dict[str, dict[str, Any]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                sample = json.loads(line)
                name = item_id(task, sample["doc_id"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a sample ({error!r})") from None
            samples.setdefault(name, sample)
    return samples


def read_metrics(folder: Path) -> dict[str, dict[str, float]]:
    """Metrics of each task and group from the newest results file: lmms-eval's own aggregation.
    ``metric,filter`` names lose the usual filter ``none``; what is no number is left out."""
    files = sorted(folder.rglob("*_results.json"), key=lambda path: path.name)
    if not files:
        return {}
    results = json.loads(files[-1].read_text(encoding="utf-8"))
    found: dict[str, dict[str, float]] = {}
    for task, metrics in {**results.get("groups", {}), **results.get("results", {})}.items():
        numbers = {
            name.removesuffix(",none"): value
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "samples"
        }
        if numbers:
            found[task] = numbers
    return found


def sample_row(
    row: str, trial: str, item: Item, sample: Mapping[str, Any], now: float
) -> dict[str, Any]:
    """The line of rows.jsonl for a sample. A failed one scores 0, whatever its task made of its
    empty answer.

    Raises:
        NoScoreError: the task logs no score.
    """
    measured = _measured(sample)
    numbers: dict[str, Any] = {name: _whole(measured.get(name)) for name in _WHOLE}
    numbers |= {name: _real(measured.get(name), digits) for name, digits in _REAL.items()}
    numbers["new_tokens"] = _whole(measured.get("new_tokens")) or 0
    error = None
    if measured.get("status") == "failed":
        error = str(measured.get("error") or "failed in lmms-eval")
    points = 0.0 if error is not None else score(item.task, sample)
    return make_row(row, trial, item, answer_text(sample), points, error, numbers, now)


def answer_text(sample: Mapping[str, Any]) -> str:
    """The model's answer before the task's filters: ``resps`` is logged where they changed it."""
    value = sample.get("resps", sample.get("filtered_resps", ""))
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return str(value).strip() if isinstance(value, (str, int, float)) else ""


def _measured(sample: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the plug-in measured for a sample; empty where it could not (log-likelihoods)."""
    counts: Sequence[Any] = sample.get("token_counts") or []
    for entry in counts:
        if isinstance(entry, Mapping) and isinstance(entry.get("tokprune"), Mapping):
            return dict(entry["tokprune"])
    return {}


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) else None


def _real(value: Any, digits: int) -> float | None:
    return round(float(value), digits) if isinstance(value, (int, float)) else None
