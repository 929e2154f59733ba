"""A tiny model and a small benchmark for sweep tests, made once a session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_processor
from pictures import landscape
from PIL import Image

from tokprune.eval.sweep.settings import Settings

QUESTIONS = {
    "count": "how many are in the picture ?",
    "place": "what is in the lake ?",
    "thing": "is there a house ?",
}


def make_model(folder: Path, family: str = "llava", **changes: Any) -> Path:
    """A model folder with a processor (36 visual tokens; for LLaVA-NeXT up to five tiles)."""
    return tiny_processor.save(folder, family, **changes)


def make_benchmark(folder: Path, items: int = 7, name: str = "small") -> Path:
    """A JSONL file of questions about a few images of different size."""
    folder.mkdir(parents=True, exist_ok=True)
    image = landscape()
    sizes = [(48, 36), (30, 40), (64, 24)]
    for number, size in enumerate(sizes):
        part = image.rotate(90 * number, expand=True).resize(size, Image.Resampling.BICUBIC)
        part.save(folder / f"{number}.png")
    tasks = list(QUESTIONS)
    lines = []
    for i in range(items):
        task = tasks[i % len(tasks)]
        lines.append({
            "id": f"q{i}", "image": f"{i % len(sizes)}.png", "task": task,
            "question": " ".join(["a"] * (i % 4) + [QUESTIONS[task]]),  # lengths differ
            "answer": ["house", f"w{i}"],
        })  # fmt: skip
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_videos(folder: Path, items: int = 6, frames: int = 4, name: str = "clips") -> Path:
    """A JSONL file of questions about a few videos: a bright square that moves over a landscape."""
    folder.mkdir(parents=True, exist_ok=True)
    ground = landscape().resize((48, 48), Image.Resampling.BICUBIC)
    for clip in range(3):
        for frame in range(frames):
            image = ground.rotate(90 * clip)
            at = (6 * frame, 12 * clip) if clip % 2 else (12 * clip, 6 * frame)
            image.paste((250, 240, 40), (*at, at[0] + 12, at[1] + 12))
            image.save(folder / f"{clip}-{frame}.png")
    tasks = list(QUESTIONS)
    lines = [
        {
            "id": f"v{i}", "frames": [f"{i % 3}-{f}.png" for f in range(frames)],
            "task": tasks[i % len(tasks)], "answer": ["house", f"w{i}"],
            "question": " ".join(["a"] * (i % 4) + [QUESTIONS[tasks[i % len(tasks)]]]),
        }
        for i in range(items)
    ]  # fmt: skip
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(model: Path, benchmark: Path, out: Path, **changes: Any) -> Settings:
    """A sweep without timing and noise floor, unless ``changes`` say otherwise."""
    small: dict[str, Any] = {
        "methods": ("fastv", "todre"), "keep": (18, 9), "batch_size": 3, "max_new_tokens": 3,
        "noise": False, "latency": False, "controls": False, "device": "cpu", "calibrate": 4,
        "seeds": (0,),
    }  # fmt: skip
    return Settings(
        model=str(model), out=str(out), benchmark=str(benchmark), **{**small, **changes}
    )


def answers(run: Any) -> dict[tuple[str, str], tuple[Any, ...]]:
    """What must not depend on how a sweep was run: everything but times."""
    return {
        (row["trial"], row["item"]): tuple(
            tuple(v) if isinstance(v, list) else v
            for k, v in sorted(row.items())
            if k not in ("seconds", "time")
        )
        for row in run.rows
    }
