"""The video model that ships with the package: loads by name, answers, and needs its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokprune
from tokprune.eval.benchmarks import load_benchmark
from tokprune.eval.benchmarks.mini_video.clip import CHANCE
from tokprune.inputs.prompts import encode
from tokprune.models import resolve, shipped_models

FOLDER = Path(resolve("mini-video"))


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tokprune.load("mini-video", processor=True, dtype="float32")


def share_right(loaded: Any, items: list[Any]) -> float:
    model, processor = loaded
    benchmark = load_benchmark("mini-video")
    clips = [benchmark.video(item) for item in items]
    inputs = encode(processor, [item.question for item in items], clips, "cpu", "video")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    given = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return sum(benchmark.score(item, a.strip()) for item, a in zip(items, given)) / len(items)


def test_it_is_small_safe_and_complete() -> None:
    assert "mini-video" in shipped_models()
    files = {p.name: p.stat().st_size for p in FOLDER.iterdir()}
    assert sum(files.values()) <= 16e6
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert {"model.safetensors", "config.json", "tokenizer.json", "processor_config.json",
            "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja",
            "README.md"} <= set(files)  # fmt: skip
    assert json.loads((FOLDER / "config.json").read_text())["model_type"] == "llava_next_video"


def test_every_weight_is_found() -> None:
    """Names in the file are those of this transformers version: nothing starts at random."""
    _, facts = tokprune.load("mini-video", output_loading_info=True)
    assert not facts["missing_keys"]
    assert not facts["unexpected_keys"]
    assert not facts["mismatched_keys"]


@pytest.mark.slow
def test_it_answers_and_needs_its_tokens(loaded: Any) -> None:
    model, _ = loaded
    benchmark = load_benchmark("mini-video")
    items = benchmark.items("validation", tasks=benchmark.headline, limit=12)
    chance = sum(CHANCE[task] for task in benchmark.headline) / len(benchmark.headline)
    whole = share_right(loaded, items)
    assert whole >= chance + 0.25
    with tokprune.compress(model, "random", keep=72):
        assert share_right(loaded, items) <= whole - 0.1
