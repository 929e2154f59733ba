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
import torch
from checkpoint import write_checkpoint
from PIL import Image

import patches.llava
import tokprune
from tokprune.cli.llava_v1 import NOTHING_COMPRESSED, app

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


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As ``python -m`` with these arguments, on a machine without a GPU."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(HERE / "cpu.py"), *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip


def model_vqa_loader(folder: Path, answers: Path) -> list[str]:
    return [
        "llava.eval.model_vqa_loader", "--model-path", str(folder / "llava-tiny"),
        "--image-folder", str(folder / "pictures"),
        "--question-file", str(folder / "questions.jsonl"), "--answers-file", str(answers),
        "--temperature", "0", "--max_new_tokens", "8",
    ]  # fmt: skip


def texts(answers: Path) -> list[str]:
    return [json.loads(line)["text"] for line in answers.read_text().splitlines()]


def test_model_vqa_loader_runs_compressed(folder: Path, tmp_path: Path) -> None:
    plain, short = tmp_path / "plain.jsonl", tmp_path / "short.jsonl"
    done = run(*model_vqa_loader(folder, plain))
    assert done.returncode == 0, done.stderr
    done = run(
        "patches.llava", "--method", "flowcut", "--keep", "12", "--option", "period=1", "--",
        "-m", *model_vqa_loader(folder, short),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "FlowCut(keep=12, period=1" in done.stderr
    assert "2 prompt(s) compressed" in done.stderr
    assert len(texts(short)) == len(texts(plain)) == 2
    assert texts(short) != texts(plain)
    # with everything kept, the very same script answers as if nothing were patched
    whole = tmp_path / "whole.jsonl"
    done = run(
        "patches.llava", "--method", "random", "--option", "keep=1.0", "--",
        "-m", *model_vqa_loader(folder, whole),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert texts(whole) == texts(plain)


def command(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        app(list(arguments))
    return stop.value.code


@pytest.fixture
def script(folder: Path, tmp_path: Path) -> Callable[[str], str]:
    """Path of a script of these lines after the package's usual imports."""

    def write(lines: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(
            "import sys, torch\n"
            "from llava.model.builder import load_pretrained_model\n"
            f"path = {str(folder / 'llava-tiny')!r}\n" + lines
        )
        return str(path)

    return write


IMAGE = (
    "tokenizer, model, processor, _ = load_pretrained_model(path, None, 'llava-tiny')\n"
    "ids = torch.tensor([[1, 5, -200, 6]])\n"
    "pictures = [torch.zeros(3, 3, 24, 24).half()]\n"
    "model.generate(ids, images=pictures, image_sizes=[(40, 14)], max_new_tokens=2)\n"
)


def test_a_script_sees_its_own_arguments_and_keeps_its_exit_code(
    script: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    path = script(IMAGE + "print('arguments', sys.argv[1:])\nsys.exit(7)\n")
    argv, original = list(sys.argv), builder.load_pretrained_model
    code = command("--method", "grid", "--keep", "9", "--", path, "--method", "x", "-m", "y")
    out, err = capfd.readouterr()
    assert code == 7
    assert "arguments ['--method', 'x', '-m', 'y']" in out
    assert "1 prompt(s) compressed" in err
    assert sys.argv == argv
    assert builder.load_pretrained_model is original


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("pass\n", "no model was loaded by llava.model.builder.load_pretrained_model"),
        (
            "_, model, _, _ = load_pretrained_model(path, None, 'llava-tiny')\n"
            "model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2)\n",
            "no image went through the model",
        ),
    ],
)
def test_says_so_when_nothing_was_compressed(
    script: Callable[[str], str], capfd: pytest.CaptureFixture[str], lines: str, why: str
) -> None:
    assert command("--method", "grid", "--keep", "9", "--", script(lines)) == NOTHING_COMPRESSED
    assert f"nothing was compressed: {why}" in capfd.readouterr().err


def test_an_error_of_the_script_is_shown_in_full(
    script: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    path = script("raise ValueError('mine')\n")
    original = builder.load_pretrained_model
    assert command("--method", "grid", "--keep", "9", "--", path) == 1
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert "ValueError: mine" in err
    assert builder.load_pretrained_model is original


def test_a_setting_instead_of_a_method(
    script: Callable[[str], str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    setting = tmp_path / "setting.json"
    setting.write_text(json.dumps({"schema": 1, "method": "divprune", "options": {"keep": 9}}))
    assert command("--setting", str(setting), "--", script(IMAGE)) in (0, None)
    assert "DivPrune(keep=9" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "9", "--", "x.py"], "give --method"),
        (["--method", "grid", "--keep", "9"], "what to run is missing"),
        (["--method", "grid", "--keep", "9", "--", "-m"], "what to run is missing"),
        (["--method", "gird", "--keep", "9", "--", "x.py"], "Did you mean 'grid'"),
        (["--method", "grid", "--keep", "9", "--option", "keep=8", "--", "x.py"], "budget once"),
        (["--setting", "s.json", "--keep", "9", "--", "x.py"], "--setting names its method"),
        (["--method", "grid", "-m", "x"], "-m"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == 2
    err = capfd.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_from_python(folder: Path) -> None:
    with patches.llava.installed("grid", keep=9) as traces:
        _, model, _, _ = builder.load_pretrained_model(
            str(folder / "llava-tiny"), None, "llava-tiny"
        )
    assert tokprune.is_patched(model)
    assert tokprune.trace_of(model) is traces[0]
    with (
        pytest.raises(ValueError, match="Did you mean"),
        patches.llava.installed("gird", keep=9),
    ):
        pass
    assert torch.equal(torch.tensor(traces[0].prefills), torch.tensor(0))
