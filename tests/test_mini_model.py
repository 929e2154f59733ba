"""The model that ships with the package: loads by name, answers, and loses answers with tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokprune
from tokprune.eval.benchmarks import load_benchmark
from tokprune.models import resolve, shipped_models

FOLDER = Path(resolve("mini"))


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tokprune.load("mini", processor=True, dtype="float32")


def answers(loaded: Any, items: list[Any]) -> list[str]:
    model, processor = loaded
    benchmark = load_benchmark("mini")
    texts = [
        processor.apply_chat_template(
            [{"role": "user",
              "content": [{"type": "image"}, {"type": "text", "text": item.question}]}],
            add_generation_prompt=True,
        )
        for item in items
    ]  # fmt: skip
    images = [benchmark.image(item) for item in items]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [a.strip() for a in processor.batch_decode(new, skip_special_tokens=True)]


def share_right(loaded: Any, items: list[Any]) -> float:
    benchmark = load_benchmark("mini")
    given = answers(loaded, items)
    return sum(benchmark.score(item, a) for item, a in zip(items, given)) / len(items)


def test_it_is_small_safe_and_complete() -> None:
    assert "mini" in shipped_models()
    files = {p.name: p.stat().st_size for p in FOLDER.iterdir()}
    assert sum(files.values()) <= 16e6
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert {"model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json",
            "chat_template.jinja", "README.md"} <= set(files)  # fmt: skip
    assert json.loads((FOLDER / "config.json").read_text())["model_type"] == "llava"


def test_every_weight_is_found() -> None:
    """Names in the file are those of this transformers version: nothing starts at random."""
    _, facts = tokprune.load("mini", output_loading_info=True)
    assert not facts["missing_keys"]
    assert not facts["unexpected_keys"]
    assert not facts["mismatched_keys"]


def test_it_answers_and_depends_on_its_tokens(loaded: Any) -> None:
    model, _ = loaded
    items = load_benchmark("mini").items("validation", limit=36)
    whole = share_right(loaded, items)
    assert whole >= 0.85
    with tokprune.compress(model, "random", keep=36):
        assert share_right(loaded, items) <= whole - 0.3
    with tokprune.compress(model, "grid", keep=576):
        assert share_right(loaded, items) == whole


def test_a_setting_is_loaded_by_name(tmp_path: Path) -> None:
    setting = {"schema": 1, "method": "divprune", "options": {"keep": 100}}
    path = tmp_path / "setting.json"
    path.write_text(json.dumps(setting))
    model = tokprune.load("mini", setting=path)
    assert "DivPrune(keep=100" in tokprune.trace_of(model).method
    with pytest.raises(ValueError, match="give method or setting, not both"):
        tokprune.load("mini", "todre", keep=9, setting=path)


def test_a_name_does_not_hide_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("./mini") == "./mini"
    assert resolve("some/other") == "some/other"
    with pytest.raises(OSError):
        tokprune.load("./mini")
