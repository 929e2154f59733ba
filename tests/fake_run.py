"""Synthetic run folders: variants × budgets × questions with known accuracies, and the images.

Answers are correlated as real ones are: every question has one difficulty for all variants, shared
in part by the questions about its image.
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
#: how much of the unpruned accuracy a variant keeps at 64 of 576 tokens
QUALITY = {
    "divprune": 0.86, "fastv": 0.70, "flowcut": 0.80, "mustdrop": 0.74, "pitome": 0.84,
    "todre": 0.93, "tome": 0.77, "transprune": 0.72, "visionzip": 0.89, "random": 0.62,
    "grid": 0.65, "pool": 0.81, "downsample": 0.83, "todre+select=k_center": 0.91,
}  # fmt: skip
UNPRUNED = {"presence": 0.97, "colour": 0.95, "count": 0.9, "size": 0.93, "where": 0.92,
            "relation": 0.61, "word": 0.96, "number": 0.95, "two_hops": 0.9}  # fmt: skip
_OPTIONS: dict[str, dict[str, Any]] = {
    "todre": {"select": "max_sum", "prune_before": [3, 5]},
    "todre+select=k_center": {"select": "k_center", "prune_before": [3, 5]},
    "transprune": {"prune_before": [1, 2, 3], "transition_layers": [0, 1, 2]},
    "random": {"seed": 0},
    "fastv": {"prune_before": 2},
}


class FakeBenchmark(Benchmark):
    """Images of coloured shapes, one per image id; questions as in :func:`items`."""

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
        rng = np.random.default_rng(int(item.image_id.removeprefix("image")))
        image = Image.new("RGB", (192, 192), tuple(int(v) for v in rng.integers(150, 230, 3)))
        draw = ImageDraw.Draw(image)
        for _ in range(9):
            x, y, s = (int(v) for v in rng.integers((0, 0, 14), (170, 170, 44)))
            shape = (draw.ellipse, draw.rectangle)[int(rng.integers(2))]
            shape((x, y, x + s, y + s), fill=tuple(int(v) for v in rng.integers(0, 255, 3)),
                  outline="black")  # fmt: skip
        return image


def items(count: int, per_image: int = 3) -> list[Item]:
    """``count`` questions, tasks in turn."""
    return [
        Item(
            id=f"item{n:05d}",
            task=TASKS[n % len(TASKS)],
            image_id=f"image{n // per_image}",
            question=f"Question {n}: what is the {TASKS[n % len(TASKS)]} here?",
            answers=(f"correct {n % 7}",),
        )
        for n in range(count)
    ]


def accuracy(variant: str, budget: float, task: str) -> float:
    """What a trial is made to reach on average."""
    top = UNPRUNED[task]
    if variant == "none":
        return top
    if variant == "blind":
        return 0.3
    at64 = QUALITY.get(variant, 0.75)
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

    ``overlays``: items in the gallery; ``failed``: failed items of the first method's first trial;
    ``missing``: items that its second trial lacks; ``chatter``: share of answers that are random.
    """
    rng = np.random.default_rng(seed)
    questions = items(count)
    image = {q.image_id: rng.normal() for q in questions}
    own = rng.normal(size=count)
    easy = np.array([0.6 * image[q.image_id] + 0.8 * o for q, o in zip(questions, own)])
    rank = (np.argsort(np.argsort(-easy)) + 0.5) / count  # 0 = easiest
    trials = _trials(methods, controls, budgets, seeds, noise, blind)
    run = _run(trials, questions, model)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    first = [c for c in trials if not c["control"] and c["status"] == "ok"]
    for trial in trials:
        if trial["status"] != "ok":
            continue
        luck = np.random.default_rng([seed, *trial["trial"].encode()])
        jitter = 0.0 if trial["variant"] == "none" else 0.12
        taste = luck.normal(size=count) * jitter
        broken = chatter if trial["variant"] != "none" else 0.01 if trial["noise"] else 0.0
        for n, item in enumerate(questions):
            if first[1:] and trial is first[1] and n < missing:
                continue
            bad = bool(first) and trial is first[0] and n < failed
            correct = rank[n] + taste[n] < accuracy(trial["variant"], trial["budget"], item.task)
            if luck.random() < broken:
                correct = not correct
            answer = item.answers[0].upper() + "." if correct else f"incorrect {luck.integers(3)}"
            lines.append(json.dumps(_row(run, trial, item, answer, correct, bad)))
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(f"{x}\n" for x in lines), encoding="utf-8")
    if latency:
        (folder / "latency.json").write_text(json.dumps(_latency(run)), encoding="utf-8")
    if overlays:
        _overlays(folder / "overlays", trials, questions[:: max(1, count // overlays)][:overlays])
    return folder


def _trials(
    methods: Sequence[str], controls: Sequence[str], budgets: Sequence[int],
    seeds: Sequence[int], noise: bool, blind: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    def trial(variant: str, budget: float, name: str, **changes: Any) -> dict[str, Any]:
        unpatched = variant in ("none", "downsample", "blind")
        options = {} if unpatched else {"keep": int(budget), **_OPTIONS.get(variant, {})}
        if variant == "downsample":
            options = {"factor": math.sqrt(N / budget)}
        base = {
            "trial": name, "variant": variant,
            "method": None if unpatched else variant.partition("+")[0],
            "options": options, "repr": f"{variant}(keep={budget})",
            "control": variant in (*CONTROLS, "none", "blind"), "budget": budget,
            "budget_text": str(budget), "match": "mean", "seed": 0, "dtype": "float32",
            "batch_size": 16, "noise": False, "status": "ok", "reason": None,
            "calibrated": {"tokens_last": float(budget), "tokens_mean": float(budget)},
        }  # fmt: skip
        return {**base, **changes}

    found = [trial("none", N, "none")]
    if noise:
        found.append(trial("none", N, "none.batch1", batch_size=1, noise=True))
        found.append(trial("none", N, "none.bfloat16", dtype="bfloat16", noise=True))
    if blind:
        found.append(trial("blind", 0, "blind"))
    for variant in (*methods, *controls):
        for budget in budgets:
            low = {"fastv": N / LAYERS * 0.6, "transprune": 40}.get(variant, 0)
            if budget < low:
                found.append(
                    trial(
                        variant, budget, f"{variant}@{budget}", status="unreachable",
                        reason=f"layers before its first pruning keep all {N} tokens; the lowest "
                        f"mean it can do is {low:.1f}",
                    )
                )  # fmt: skip
                continue
            for s in seeds if variant == "random" else (0,):
                name = f"{variant}@{budget}" + (f".s{s}" if s else "")
                found.append(trial(variant, budget, name, seed=s))
                if variant == "random":
                    found[-1]["options"] = {**found[-1]["options"], "seed": s}
    return found


def _run(trials: list[dict[str, Any]], questions: Sequence[Item], model: str) -> dict[str, Any]:
    return {
        "schema": 2, "created": "2026-01-01T00:00:00+00:00", "updated": "2026-01-01T00:10:00+00:00",
        "finished": True, "command": "tokprune sweep --model tiny --benchmark fake --out runs/x",
        "tokprune": "0.1.0", "code": "c0de" * 16,
        "environment": {"python": "3.11", "torch": "2.9", "transformers": "5.2",
                        "tokprune": "0.1.0", "device": "cpu", "cpu": "a processor",
                        "threads": 2, "platform": "Linux"},
        "settings": {"budgets": sorted({c["budget"] for c in trials if c["variant"] != "none"}),
                     "batch_size": 16, "seeds": [0]},
        "model": {"name": model, "class": "LlavaForConditionalGeneration", "family": "llava",
                  "hash": f"hash-of-{model}", "parameters": 3_300_000, "visual_tokens": N,
                  "decoder_layers": LAYERS, "dtype": "float32"},
        "benchmark": {"name": "fake", "version": "1", "split": "test", "tasks": list(TASKS),
                      "groups": {k: list(v) for k, v in GROUPS.items()},
                      "headline": [t for t in TASKS if t not in OUTSIDE], "items": len(questions)},
        "trials": trials,
    }  # fmt: skip


def _row(
    run: dict[str, Any], trial: dict[str, Any], item: Item, answer: str, correct: bool, bad: bool
) -> dict[str, Any]:
    saved = trial["variant"] not in ("none", "downsample", "blind")
    tokens = trial["budget"] if saved else N
    text = 22
    return {
        "row": row_id(run, trial, item.id, item.task), "trial": trial["trial"], "item": item.id,
        "image": item.image_id, "task": item.task, "question": item.question,
        "answers": list(item.answers), "answer": "" if bad else answer,
        "score": 0.0 if bad else float(correct), "status": "failed" if bad else "ok",
        "error": "RuntimeError: out of memory" if bad else None, "tokens_in": N,
        "tokens_last": float(tokens), "tokens_mean": float(tokens),
        "macs": 40_000_000 + 500_000 * (tokens + text), "macs_unpruned": 40_000_000 + 500_000 * 598,
        "kv_bytes": 6144 * (tokens + text), "kv_bytes_unpruned": 6144 * 598,
        "prompt_tokens": N + text, "new_tokens": 3, "seconds": 0.01, "time": 1.7e9,
    }  # fmt: skip


def _latency(run: dict[str, Any]) -> dict[str, Any]:
    trials = {}
    for n, trial in enumerate(run["trials"]):
        if trial["status"] != "ok" or trial["noise"] or trial["variant"] in ("downsample", "blind"):
            continue
        tokens = N if trial["variant"] == "none" else trial["budget"]
        work = 0.0 if trial["variant"] == "none" else 0.0008 * (1 + n % 4)
        parts = {"encoder": 0.02, "prefill": 0.006 + 7e-5 * tokens, "decode_per_token": 0.003}
        parts["total"] = sum(parts.values()) + work
        trials[trial["trial"]] = {
            name: {"median": v, "q1": 0.97 * v, "q3": 1.05 * v, "n": 9} for name, v in parts.items()
        }
        selection = {"median": work, "q1": work, "q3": work, "n": 9} if work else None
        trials[trial["trial"]]["selection"] = selection
    return {"environment": run["environment"], "clock": "wall", "batch_size": 1,
            "prompt_tokens": N + 22, "new_tokens": 1, "trials": trials}  # fmt: skip


def _overlays(folder: Path, trials: list[dict[str, Any]], questions: Sequence[Item]) -> None:
    folder.mkdir()
    rng = np.random.default_rng(5)
    for item in questions:
        for trial in trials:
            if trial["status"] != "ok" or trial["method"] is None:
                continue
            kept = sorted(rng.choice(N, int(trial["budget"]), replace=False).tolist())
            patches = [[k // GRID, k % GRID, 0] for k in kept]
            record: dict[str, Any] = {
                "item": item.id, "trial": trial["trial"], "layer": LAYERS - 1, "kept": patches,
                "merged": trial["method"] in ("tome", "pitome", "pool", "visionzip"),
            }  # fmt: skip
            if record["merged"]:
                record["sources"] = [
                    [[r, c, 0], *([[r, c + 1, 0]] if c + 1 < GRID else [])] for r, c, _ in patches
                ]
            name = f"{item.id}__{trial['trial']}.json"
            (folder / name).write_text(json.dumps(record), encoding="utf-8")
