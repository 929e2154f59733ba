"""Synthetic run folders: arms × budgets × questions with known accuracies, and the pictures.

Answers are correlated as real ones are: every question has one difficulty for all arms, shared in
part by the questions about its picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.sweep.identity import row_id

N, GRID, LAYERS = 576, 24, 4
TASKS = ("presence", "colour", "count", "size", "where", "relation", "word", "number", "two_hops")
GROUPS = {
    "recognition": ("presence", "colour"),
    "counting": ("count", "size"),
    "spatial": ("where", "relation"),
    "reading": ("word", "number", "two_hops"),
}
OUTSIDE = ("relation",)  # not in the headline
METHODS = ("divprune", "fastv", "flowcut", "mustdrop", "pitome", "todre", "tome", "transprune",
           "visionzip")  # fmt: skip
CONTROLS = ("random", "grid", "pool", "downsample")
BUDGETS = (16, 36, 64, 144, 288)
#: how much of the unpruned accuracy an arm keeps at 64 of 576 tokens
QUALITY = {
    "divprune": 0.86, "fastv": 0.70, "flowcut": 0.80, "mustdrop": 0.74, "pitome": 0.84,
    "todre": 0.93, "tome": 0.77, "transprune": 0.72, "visionzip": 0.89, "random": 0.62,
    "grid": 0.65, "pool": 0.81, "downsample": 0.83, "todre+select=k_center": 0.91,
}  # fmt: skip
UNPRUNED = {"presence": 0.97, "colour": 0.95, "count": 0.9, "size": 0.93, "where": 0.92,
            "relation": 0.61, "word": 0.96, "number": 0.95, "two_hops": 0.9}  # fmt: skip
_OPTIONS: dict[str, dict[str, Any]] = {
    "todre": {"select": "max_sum", "check_layers": [3, 5]},
    "todre+select=k_center": {"select": "k_center", "check_layers": [3, 5]},
    "transprune": {"prune_layers": [1, 2, 3], "accumulate_layers": [1, 2, 3]},
    "random": {"seed": 0},
    "fastv": {"layer": 2},
}


class FakeBenchmark(Benchmark):
    """Pictures of coloured shapes, one per image id; questions as in :func:`items`."""

    name, version, splits = "fake", "1", ("test",)
    tasks, groups = TASKS, GROUPS
    headline = tuple(t for t in TASKS if t not in OUTSIDE)

    def __init__(self, count: int = 90) -> None:
        self._items = items(count)

    def items(
        self, split: str | None = None, tasks: Sequence[str] | None = None, limit: int | None = None
    ) -> list[Item]:
        return self._items

    def image(self, item: Item) -> Image.Image:
        rng = np.random.default_rng(int(item.image_id.removeprefix("picture")))
        picture = Image.new("RGB", (192, 192), tuple(int(v) for v in rng.integers(150, 230, 3)))
        draw = ImageDraw.Draw(picture)
        for _ in range(9):
            x, y, s = (int(v) for v in rng.integers((0, 0, 14), (170, 170, 44)))
            shape = (draw.ellipse, draw.rectangle)[int(rng.integers(2))]
            shape((x, y, x + s, y + s), fill=tuple(int(v) for v in rng.integers(0, 255, 3)),
                  outline="black")  # fmt: skip
        return picture


def items(count: int, per_picture: int = 3) -> list[Item]:
    """``count`` questions, tasks in turn."""
    return [
        Item(
            id=f"item{n:05d}",
            task=TASKS[n % len(TASKS)],
            image_id=f"picture{n // per_picture}",
            question=f"Question {n}: what is the {TASKS[n % len(TASKS)]} here?",
            answers=(f"right {n % 7}",),
        )
        for n in range(count)
    ]


def accuracy(arm: str, budget: float, task: str) -> float:
    """What a cell is made to reach on average."""
    top = UNPRUNED[task]
    if arm == "none":
        return top
    if arm == "blind":
        return 0.3
    at64 = QUALITY.get(arm, 0.75)
    harder = 1.25 if task in GROUPS["reading"] else 0.85
    lost = (1 - at64) * harder * (64 / budget) ** 0.6 * (1 - budget / N) ** 0.3
    return max(0.15, top * (1 - lost))


def make_run(
    folder: Path,
    *,
    count: int = 90,
    methods: Sequence[str] = ("divprune", "fastv", "todre"),
    controls: Sequence[str] = CONTROLS,
    budgets: Sequence[int] = (16, 64, 144),
    seeds: Sequence[int] = (0,),
    noise: bool = True,
    blind: bool = False,
    latency: bool = True,
    overlays: int = 0,
    failed: int = 0,
    missing: int = 0,
    seed: int = 0,
    model: str = "tiny",
    chatter: float = 0.03,
) -> Path:
    """Write a run folder.

    ``overlays``: items in the gallery; ``failed``: failed items of the first method's first cell;
    ``missing``: items that its second cell lacks; ``chatter``: share of answers that are random.
    """
    rng = np.random.default_rng(seed)
    questions = items(count)
    picture = {q.image_id: rng.normal() for q in questions}
    own = rng.normal(size=count)
    easy = np.array([0.6 * picture[q.image_id] + 0.8 * o for q, o in zip(questions, own)])
    rank = (np.argsort(np.argsort(-easy)) + 0.5) / count  # 0 = easiest
    cells = _cells(methods, controls, budgets, seeds, noise, blind)
    run = _run(cells, questions, model)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    first = [c for c in cells if not c["control"] and c["status"] == "ok"]
    for cell in cells:
        if cell["status"] != "ok":
            continue
        luck = np.random.default_rng([seed, *cell["cell"].encode()])
        jitter = 0.0 if cell["arm"] == "none" else 0.12
        taste = luck.normal(size=count) * jitter
        broken = chatter if cell["arm"] != "none" else 0.01 if cell["noise"] else 0.0
        for n, item in enumerate(questions):
            if first[1:] and cell is first[1] and n < missing:
                continue
            bad = bool(first) and cell is first[0] and n < failed
            right = rank[n] + taste[n] < accuracy(cell["arm"], cell["budget"], item.task)
            if luck.random() < broken:
                right = not right
            answer = item.answers[0].upper() + "." if right else f"wrong {luck.integers(3)}"
            lines.append(json.dumps(_row(run, cell, item, answer, right, bad)))
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(f"{x}\n" for x in lines), encoding="utf-8")
    if latency:
        (folder / "latency.json").write_text(json.dumps(_latency(run)), encoding="utf-8")
    if overlays:
        _overlays(folder / "overlays", cells, questions[:: max(1, count // overlays)][:overlays])
    return folder


def _cells(
    methods: Sequence[str], controls: Sequence[str], budgets: Sequence[int],
    seeds: Sequence[int], noise: bool, blind: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    def cell(arm: str, budget: float, name: str, **changes: Any) -> dict[str, Any]:
        unpatched = arm in ("none", "downsample", "blind")
        options = {} if unpatched else {"keep": int(budget), **_OPTIONS.get(arm, {})}
        if arm == "downsample":
            options = {"factor": math.sqrt(N / budget)}
        base = {
            "cell": name, "arm": arm, "method": None if unpatched else arm.partition("+")[0],
            "options": options, "repr": f"{arm}(keep={budget})",
            "control": arm in (*CONTROLS, "none", "blind"), "budget": budget,
            "budget_asked": str(budget), "match": "mean", "seed": 0, "dtype": "float32",
            "batch_size": 16, "noise": False, "status": "ok", "reason": None,
            "calibrated": {"tokens_last": float(budget), "tokens_mean": float(budget)},
        }  # fmt: skip
        return {**base, **changes}

    found = [cell("none", N, "none")]
    if noise:
        found.append(cell("none", N, "none.batch1", batch_size=1, noise=True))
        found.append(cell("none", N, "none.bfloat16", dtype="bfloat16", noise=True))
    if blind:
        found.append(cell("blind", 0, "blind"))
    for arm in (*methods, *controls):
        for budget in budgets:
            low = {"fastv": N / LAYERS * 0.6, "transprune": 40}.get(arm, 0)
            if budget < low:
                found.append(
                    cell(
                        arm, budget, f"{arm}@{budget}", status="unreachable",
                        reason=f"layers before its first pruning keep all {N} tokens; the lowest "
                        f"mean it can do is {low:.1f}",
                    )
                )  # fmt: skip
                continue
            for s in seeds if arm == "random" else (0,):
                name = f"{arm}@{budget}" + (f".s{s}" if s else "")
                found.append(cell(arm, budget, name, seed=s))
                if arm == "random":
                    found[-1]["options"] = {**found[-1]["options"], "seed": s}
    return found


def _run(cells: list[dict[str, Any]], questions: Sequence[Item], model: str) -> dict[str, Any]:
    return {
        "schema": 1, "created": "2026-01-01T00:00:00+00:00", "updated": "2026-01-01T00:10:00+00:00",
        "finished": True, "command": "tokprune sweep --model tiny --benchmark fake --out runs/x",
        "tokprune": "0.1.0", "code": "c0de" * 16,
        "environment": {"python": "3.11", "torch": "2.9", "transformers": "5.2",
                        "tokprune": "0.1.0", "device": "cpu", "cpu": "a processor",
                        "threads": 2, "platform": "Linux"},
        "settings": {"budgets": sorted({c["budget"] for c in cells if c["arm"] != "none"}),
                     "batch_size": 16, "seeds": [0]},
        "model": {"name": model, "class": "LlavaForConditionalGeneration", "family": "llava",
                  "hash": f"hash-of-{model}", "parameters": 3_300_000, "visual_tokens": N,
                  "decoder_layers": LAYERS, "dtype": "float32"},
        "benchmark": {"name": "fake", "version": "1", "split": "test", "tasks": list(TASKS),
                      "groups": {k: list(v) for k, v in GROUPS.items()},
                      "headline": [t for t in TASKS if t not in OUTSIDE], "items": len(questions)},
        "cells": cells,
    }  # fmt: skip


def _row(
    run: dict[str, Any], cell: dict[str, Any], item: Item, answer: str, right: bool, bad: bool
) -> dict[str, Any]:
    saved = cell["arm"] not in ("none", "downsample", "blind")
    tokens = cell["budget"] if saved else N
    text = 22
    return {
        "row": row_id(run, cell, item.id, item.task), "cell": cell["cell"], "item": item.id,
        "image": item.image_id, "task": item.task, "question": item.question,
        "answers": list(item.answers), "answer": "" if bad else answer,
        "score": 0.0 if bad else float(right), "status": "failed" if bad else "ok",
        "error": "RuntimeError: out of memory" if bad else None, "tokens_in": N,
        "tokens_last": float(tokens), "tokens_mean": float(tokens),
        "macs": 40_000_000 + 500_000 * (tokens + text), "macs_unpruned": 40_000_000 + 500_000 * 598,
        "kv_bytes": 6144 * (tokens + text), "kv_bytes_unpruned": 6144 * 598,
        "prompt_tokens": N + text, "new_tokens": 3, "seconds": 0.01, "time": 1.7e9,
    }  # fmt: skip


def _latency(run: dict[str, Any]) -> dict[str, Any]:
    cells = {}
    for n, cell in enumerate(run["cells"]):
        if cell["status"] != "ok" or cell["noise"] or cell["arm"] in ("downsample", "blind"):
            continue
        tokens = N if cell["arm"] == "none" else cell["budget"]
        work = 0.0 if cell["arm"] == "none" else 0.0008 * (1 + n % 4)
        parts = {"encoder": 0.02, "prefill": 0.006 + 7e-5 * tokens, "decode_per_token": 0.003}
        parts["total"] = sum(parts.values()) + work
        cells[cell["cell"]] = {
            name: {"median": v, "q1": 0.97 * v, "q3": 1.05 * v, "n": 9} for name, v in parts.items()
        }
        selection = {"median": work, "q1": work, "q3": work, "n": 9} if work else None
        cells[cell["cell"]]["selection"] = selection
    return {"environment": run["environment"], "clock": "wall", "batch_size": 1,
            "prompt_tokens": N + 22, "new_tokens": 1, "cells": cells}  # fmt: skip


def _overlays(folder: Path, cells: list[dict[str, Any]], questions: Sequence[Item]) -> None:
    folder.mkdir()
    rng = np.random.default_rng(5)
    for item in questions:
        for cell in cells:
            if cell["status"] != "ok" or cell["method"] is None:
                continue
            kept = sorted(rng.choice(N, int(cell["budget"]), replace=False).tolist())
            patches = [[k // GRID, k % GRID, 0] for k in kept]
            record: dict[str, Any] = {
                "item": item.id, "cell": cell["cell"], "layer": LAYERS - 1, "kept": patches,
                "merged": cell["method"] in ("tome", "pitome", "pool", "visionzip"),
            }  # fmt: skip
            if record["merged"]:
                record["sources"] = [
                    [[r, c, 0], *([[r, c + 1, 0]] if c + 1 < GRID else [])] for r, c, _ in patches
                ]
            name = f"{item.id}__{cell['cell']}.json"
            (folder / name).write_text(json.dumps(record), encoding="utf-8")
