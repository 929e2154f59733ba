"""A small sweep through lmms-eval on the embedded model, and the same questions of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokprune.eval.benchmarks.mini import MiniBenchmark
from tokprune.eval.sweep import Settings

#: types of question, and how many of each
KINDS, EACH = ("color", "count", "plate"), 3
TASKS = tuple(f"tokprune_mini_{kind}" for kind in KINDS)
BUDGETS = (64, 144)
METHODS = ("divprune", "visionzip")
#: numbers of a row that do not depend on the clock
SAME = (
    "question", "answers", "answer", "score", "status", "error", "tokens_in", "tokens_last",
    "tokens_mean", "macs", "macs_unpruned", "kv_bytes", "kv_bytes_unpruned", "prompt_tokens",
    "new_tokens",
)  # fmt: skip


def settings(out: Path, **changes: Any) -> Settings:
    """The sweep through lmms-eval."""
    given: dict[str, Any] = {
        "harness": "lmms-eval", "model": "mini", "tasks": TASKS, "limit": EACH,
        "methods": METHODS, "keep": BUDGETS, "controls": False, "noise": False, "device": "cpu",
        "calibrate": 2,
    }  # fmt: skip
    return Settings(out=str(out), **{**given, **changes})


def own_settings(out: Path, **changes: Any) -> Settings:
    """The same questions, asked by our own harness one at a time."""
    given: dict[str, Any] = {
        "model": "mini", "benchmark": "mini", "split": "test", "tasks": KINDS,
        "limit": EACH * len(KINDS), "methods": METHODS, "keep": BUDGETS, "controls": False,
        "noise": False, "latency": False, "device": "cpu", "calibrate": 2, "batch_size": 1,
    }  # fmt: skip
    return Settings(out=str(out), **{**given, **changes})


def own_names() -> dict[str, str]:
    """Item ids of lmms-eval → ids of the benchmark."""
    benchmark = MiniBenchmark()
    return {
        f"tokprune_mini_{kind}:{number}": item.id
        for kind in KINDS
        for number, item in enumerate(benchmark.items("test", [kind])[:EACH])
    }


def numbers(
    run: Any, names: dict[str, str] | None = None
) -> dict[tuple[str, str], tuple[Any, ...]]:
    """What must not depend on who asks, by trial and item."""
    return {
        (row["trial"], row["item"] if names is None else names[row["item"]]): tuple(
            tuple(v) if isinstance(v := row[name], list) else v for name in SAME
        )
        for row in run.rows
    }
