"""A small ledger and a run that repeats some of its rows, with the embedded model in the role of
LLaVA-1.5-7B: it has as many visual tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokprune.eval.benchmarks.mini import MiniBenchmark

PAPER = {"key": "toy", "title": "A Toy", "arxiv": "2501.00001", "year": 2025, "venue": None,
         "code": None}  # fmt: skip
ZIP = {"dominant": 54, "contextual": 10}
FASTV = {"keep": 166, "prune_before": 2}


def row(method: str, label: str, benchmark: str, value: float, **changes: Any) -> dict[str, Any]:
    """A row of the toy paper; ``budget`` may be changed field by field."""
    budget = {"printed": "64", "tokens": 64, "unpruned": 576, "kind": "input", "mean": 64,
              **changes.pop("budget", {})}  # fmt: skip
    if method == "none":
        budget = {"printed": "unpruned", "tokens": 576, "unpruned": 576, "kind": "input",
                  "mean": 576}  # fmt: skip
    return {
        "table": "Table 1", "source": "arXiv 2501.00001", "spec": "toy.md, section 8",
        "method": method, "label": label, "options": {} if method == "none" else None,
        "options_from": "paper" if method == "none" else None, "model": "llava-1.5-7b",
        "benchmark": benchmark, "benchmark_label": benchmark.upper(), "split": None,
        "metric": "accuracy", "unit": "%", "value": value, "budget": budget, "harness": None,
        "cache": None, "positions": None, "status": "read", "note": None, **changes,
    }  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Rows that can be run, and one for every reason why one cannot."""
    known = {"options": ZIP, "options_from": "official"}
    pope: dict[str, Any] = {"metric": "accuracy or F1"}
    return [
        row("none", "LLaVA", "gqa", 100.0),
        row("visionzip", "VisionZip", "gqa", 60.0, **known),
        row("fastv", "FastV", "gqa", 1.0, options=FASTV, options_from="inferred",
            budget={"printed": "192", "tokens": 192, "kind": "mean", "mean": 192}),
        row("none", "LLaVA", "pope", 85.9, **pope),
        row("visionzip", "VisionZip", "pope", 77.0, **known, **pope),
        row("elsewhere", "Elsewhere", "gqa", 58.0),
        row("todre", "ToDRE", "gqa", 57.0, note="ratios unknown"),
        row("transprune", "TransPrune", "gqa", 61.4, options={"keep": [0.875, 0.625, 0.125]},
            options_from="official"),
        row("visionzip", "VisionZip", "mme", 1690, **known, metric="perception", unit="score"),
        row("visionzip", "VisionZip", "textvqa", 55.5, **known),
        row("visionzip", "VisionZip", "average", 94.0, unit="% of unpruned",
            metric="mean of score ÷ unpruned score"),
        row("visionzip", "VisionZip", "pope", 69.2, metric="prefill time", unit="ms"),
        row("visionzip", "VisionZip", "gqa", 50.0, model="qwen2-vl-7b",
            budget={"unpruned": None}),
        row("visionzip", "VisionZip", "vqav2", 72.4, **known, split="test-dev"),
    ]  # fmt: skip


def make_ledger(folder: Path, changed: list[dict[str, Any]] | None = None) -> Path:
    """A folder with the toy paper."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema": 1, "paper": PAPER, "tables": {"Table 1": "Made up."},
               "rows": rows() if changed is None else changed}  # fmt: skip
    (folder / "toy.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def make_questions(folder: Path, each: int = 5) -> Path:
    """Questions of the embedded benchmark under names of the ledger: ``gqa``, ``pope``, and
    ``mme``."""
    folder.mkdir(parents=True, exist_ok=True)
    benchmark = MiniBenchmark()
    lines = []
    for task, name in (("color", "gqa"), ("presence", "POPE"), ("shape", "mme")):
        for item in benchmark.items("quick", [task], each):
            path = folder / f"{item.image_id}.png"
            benchmark.image(item).save(path)
            lines.append(json.dumps({
                "id": item.id, "image": path.name, "task": name, "question": item.question,
                "answers": list(item.answers),
            }))  # fmt: skip
    target = folder / "questions.jsonl"
    target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return target
