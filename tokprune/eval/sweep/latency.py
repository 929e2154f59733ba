"""Time every cell at the end of a sweep, in turns, on one question."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokprune.eval.sweep.environment import environment
from tokprune.eval.sweep.loaded_model import Subject
from tokprune.eval.sweep.trials import Cell

PARTS = ("encoder", "selection", "prefill", "decode_per_token", "total")


def timed_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that have a time of their own: ``none``, those with a method, and smaller pictures
    or shorter videos where they have fewer tokens."""
    full = next((c.entry["calibrated"]["tokens_mean"] for c in cells if c.id == "none"), math.inf)
    return [
        cell
        for cell in cells
        if cell.runs
        and not cell.entry["noise"]
        and cell.entry["arm"] != "blind"
        and (cell.smaller is None or cell.entry["calibrated"]["tokens_mean"] < full)
    ]


def measure_latency(
    subject: Subject,
    inputs: Any,
    cells: Sequence[Cell],
    rounds: int,
    max_new_tokens: int,
    progress: Callable[[int, int], None] | None = None,
    own_inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The object of latency.json, all cells interleaved.

    Args:
        inputs: a batch of one question.
        cells: those of :func:`timed_cells`.
        rounds: measurements of each part.
        progress: called with (rounds done, rounds).
        own_inputs: the same question with other pictures or frames, by cell id.
    """
    from tokprune.bench.measure import measure_cells

    arms = {cell.id: cell.method for cell in cells}
    times = measure_cells(
        subject.model, inputs, arms, rounds=rounds, max_new_tokens=max_new_tokens,
        progress=progress, own_inputs=own_inputs,
    )  # fmt: skip
    return {
        "environment": environment(subject.device),
        "clock": "wall",
        "batch_size": len(inputs["input_ids"]),
        "prompt_tokens": int(inputs["attention_mask"].sum()) // len(inputs["input_ids"]),
        "new_tokens": max_new_tokens,
        "cells": {
            name: {part: spread(own[part]) if own.get(part) else None for part in PARTS}
            for name, own in times.items()
        },
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0], "n": len(values)}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}
