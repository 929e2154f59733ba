"""``python -m patches.llava``: scripts of the package, unmodified, compressed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llava.model.builder as builder
import pytest
from checkpoint import write_checkpoint
from PIL import Image

import tokprune

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
QUESTIONS = ["what is in the picture?", "how many red squares are there?"]


@pytest.fixture(scope="module")
def folder(original: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose name says 'llava', as the package wants it, pictures and questions."""
    root = tmp_path_factory.mktemp("task")
    write_checkpoint(original("anyres"), root).rename(root / "llava-tiny")
    (root / "pictures").mkdir()
    lines = []
    for number, (question, size) in enumerate(zip(QUESTIONS, [(40, 14), (30, 44)])):
        picture = Image.radial_gradient("L").resize(size).convert("RGB")
        picture.save(root / "pictures" / f"{number}.png")
        lines.append({"question_id": number, "image": f"{number}.png", "text": question})
    (root / "questions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return root


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)


def compressed(*options: str) -> list[str]:
    return [sys.executable, "-m", "patches.llava", *options, "--"]


def model_vqa_loader(folder: Path, answers: Path) -> list[str]:
    return [
        sys.executable, str(HERE / "cpu.py"), "llava.eval.model_vqa_loader",
        "--model-path", str(folder / "llava-tiny"), "--image-folder", str(folder / "pictures"),
        "--question-file", str(folder / "questions.jsonl"), "--answers-file", str(answers),
        "--temperature", "0", "--max_new_tokens", "8",
    ]  # fmt: skip


def texts(answers: Path) -> list[str]:
    return [json.loads(line)["text"] for line in answers.read_text().splitlines()]


def test_model_vqa_loader_runs_compressed(folder: Path, tmp_path: Path) -> None:
    plain, short = tmp_path / "plain.jsonl", tmp_path / "short.jsonl"
    done = run(*model_vqa_loader(folder, plain))
    assert done.returncode == 0, done.stderr
    options = ["--method", "flowcut", "--keep", "12", "--option", "period=1"]
    done = run(
        *compressed(*options, "--json", str(tmp_path / "n")), *model_vqa_loader(folder, short)
    )
    assert done.returncode == 0, done.stderr
    assert "FlowCut(keep=12, period=1" in done.stderr
    numbers = json.loads((tmp_path / "n").read_text())
    assert [(m["model"], m["prompts"], m["reduced"]) for m in numbers["models"]] == [
        ("LlavaLlamaForCausalLM", 2, 2)
    ]
    assert len(texts(short)) == len(texts(plain)) == 2
    assert texts(short) != texts(plain)
    # with everything kept, the very same script answers as if nothing were patched
    whole = tmp_path / "whole.jsonl"
    options = ["--method", "random", "--option", "keep=1.0"]
    done = run(*compressed(*options), *model_vqa_loader(folder, whole))
    assert done.returncode == 3, done.stderr
    assert "kept every token of every image" in done.stderr
    assert texts(whole) == texts(plain)


IMAGE = (
    "tokenizer, model, processor, _ = load_pretrained_model(path, None, 'llava-tiny')\n"
    "ids = torch.tensor([[1, 5, -200, 6]])\n"
    "pictures = [torch.zeros(3, 3, 24, 24).half()]\n"
    "model.generate(ids, images=pictures, image_sizes=[(40, 14)], max_new_tokens=2)\n"
)
TEXT = (
    "_, model, _, _ = load_pretrained_model(path, None, 'llava-tiny')\n"
    "model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2)\n"
)


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        (IMAGE, 0, "LlavaLlamaForCausalLM"),
        ("pass\n", 3, "no supported model was loaded"),
        (TEXT, 3, "LlavaLlamaForCausalLM answered, and no prompt had an image"),
    ],
)
def test_says_whether_a_script_was_compressed(
    folder: Path, tmp_path: Path, lines: str, code: int, said: str
) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "import sys, torch\n"
        "from llava.model.builder import load_pretrained_model\n"
        f"path = {str(folder / 'llava-tiny')!r}\n" + lines
    )
    setting = tmp_path / "setting.json"
    setting.write_text(json.dumps({"schema": 1, "method": "divprune", "options": {"keep": 9}}))
    done = run(*compressed("--setting", str(setting)), str(path))
    assert done.returncode == code, done.stderr
    assert said in done.stderr


def test_from_python(folder: Path) -> None:
    original = builder.load_pretrained_model
    with tokprune.patch_on_load("grid", keep=9) as traces:
        _, model, _, _ = builder.load_pretrained_model(
            str(folder / "llava-tiny"), None, "llava-tiny"
        )
    assert builder.load_pretrained_model is original
    assert tokprune.trace_of(model) is traces[0]
    assert len(traces) == 1
