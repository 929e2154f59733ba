"""Kept-token records of a few items, for the report's gallery."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from tokprune.eval.benchmarks.base import Item
from tokprune.eval.sweep.trials import Trial
from tokprune.trace import Trace
from tokprune.trace.provenance import cells_of_tile

#: the gallery shows the budget nearest to this share of an image's tokens
_SHARE = 0.11


def gallery_items(items: Sequence[Item]) -> set[str]:
    """Ids of the first item of each task."""
    first: dict[str, str] = {}
    for item in items:
        first.setdefault(item.task, item.id)
    return set(first.values())


def gallery_trials(trials: Sequence[Trial], visual_tokens: float) -> set[str]:
    """Ids of the trials with a method at the budget nearest to 11 % of the tokens."""
    main = [c for c in trials if c.runs and c.method is not None and not c.entry["seed"]]
    target = _SHARE * visual_tokens
    budget = min((c.entry["budget"] for c in main), key=lambda b: abs(b - target), default=None)
    return {c.id for c in main if c.entry["budget"] == budget}


#: letters of an item's id, and of a trial's, in a file name
_LONGEST = 80


def overlay_name(item: str, trial: str) -> str:
    """File name of a record."""
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", item)
    if slug != item or len(slug) > _LONGEST:
        slug = _cut(item, slug)
    return f"{slug}__{trial if len(trial) <= _LONGEST else _cut(trial, trial)}.json"


def _cut(name: str, slug: str) -> str:
    known = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()
    return f"{slug[:_LONGEST]}-{known[:6]}"


def overlay_record(trace: Trace, row: int, item: str, trial: str) -> dict[str, Any]:
    """Patches alive in the last decoder layer that holds any, for one row of a batch; of several
    images those of the first."""
    assert trace.last is not None
    layers = trace.last.layers
    alive = [n for n, layer in enumerate(layers) if any(layer.counts[row])]
    layer = alive[-1] if alive else len(layers) - 1
    tiles, grid = _grid(trace, row)
    tokens = [
        t for t in trace.kept(layer, row)
        if t.kind == "patch" and ("frames" in grid or not t.image)
    ]  # fmt: skip
    merged = any(len(t.sources) > 1 for t in tokens)

    def number(tile: int) -> int:
        return (tile + 1) % tiles if tiles else tile

    record: dict[str, Any] = {
        "item": item,
        "trial": trial,
        "layer": layer,
        "kept": [[t.row, t.col, number(t.tile)] for t in tokens],
        "merged": merged,
        **grid,
    }
    if merged:
        record["sources"] = [
            [[row, col, number(tile)] for tile, row, col in t.sources] for t in tokens
        ]
    return record


def _grid(trace: Trace, row: int) -> tuple[int, dict[str, Any]]:
    """Of a video: its ``frames``, which are the tiles of the patches, and the ``grid`` (height,
    width) of each. Of an image on a grid of the language-model input: that ``grid``, and before it
    the number of tiles whose last shows the whole image, which is to be tile 0 (0: it is)."""
    assert trace.last is not None
    (parts, *_) = trace.last.visuals(row)
    records = [part.record for part in parts if part.record is not None]
    if not records:
        return 0, {}
    layout, grid = records[0].layout, list(cells_of_tile(records[0]))
    if layout.video:
        return 0, {"frames": sum(record.layout.frames for record in records), "grid": grid}
    if records[0].facts is not None or layout.token_grid is None:
        return 0, {}
    return len(layout.token_grid.grids), {"grid": grid}
