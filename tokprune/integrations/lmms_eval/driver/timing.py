"""Times of a sweep through lmms-eval: medians over the answers themselves."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tokprune.eval.sweep.latency import spread, timed_cells
from tokprune.eval.sweep.trials import Cell

#: parts of latency.json and the fields of a row that they come from
_PARTS = {"prefill": "prefill_seconds", "total": "seconds"}
HOW = (
    "over the answers that lmms-eval asked for, cells one after another, each in a process "
    "of its own"
)


def answer_times(
    cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The object of latency.json, None where an answer was not timed."""
    timed = {cell.id for cell in timed_cells(cells)}
    own: dict[str, list[Mapping[str, Any]]] = {name: [] for name in timed}
    for row in rows:
        if row["cell"] in timed and row["status"] == "ok":
            own[row["cell"]].append(row)
    told: dict[str, dict[str, Any]] = {}
    for name, answers in own.items():
        values: dict[str, list[Any]] = {
            part: [answer.get(field) for answer in answers] for part, field in _PARTS.items()
        }
        if not answers or any(None in times for times in values.values()):
            return None
        told[name] = {part: spread(times) for part, times in values.items()}
    if not told:
        return None
    base = own.get("none") or next(iter(own.values()))
    return {
        "environment": dict(environment),
        "clock": "wall",
        "how": HOW,
        "batch_size": cells[0].entry["batch_size"],
        "prompt_tokens": round(statistics.median(row["prompt_tokens"] for row in base)),
        "new_tokens": round(statistics.median(row["new_tokens"] for row in base)),
        "cells": {cell.id: told[cell.id] for cell in timed_cells(cells)},
    }
