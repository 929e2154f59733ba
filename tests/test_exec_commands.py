"""``tokprune exec``: commands that know nothing of tokprune, compressed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_processor
import torch

import tokprune
from tokprune.integrations.exec.run import run_patched
from tokprune.integrations.exec.verdict import Verdict
from tokprune.integrations.exec.watch import watch_text
from tokprune.methods import FastV, Grid


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_processor.save(tmp_path_factory.mktemp("models") / "llava")


SCRIPT = """\
import os, sys
import torch
from transformers import AutoModelForImageTextToText
sys.path.insert(0, {tests!r})
from tokprune.testing.prompts import make_inputs

def answer(folder, prompt=(3, "image", 4)):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    inputs = make_inputs(model, [list(prompt)])
    if prompt == (5,):
        inputs = dict(input_ids=inputs["input_ids"])
    return model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, -3:].tolist()

"""


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """Path of a script with these lines after ``answer``, which loads a model and asks it."""

    def write(lines: str) -> str:
        path = tmp_path / "their_script.py"
        path.write_text(SCRIPT.format(tests=str(Path(__file__).parent)) + lines)
        return str(path)

    return write


def test_the_command(folder: Path, script: Any, tmp_path: Path) -> None:
    """Arguments and exit code are the script's own; answers are those of a loaded model."""
    path = script("print(answer(sys.argv[1]), sys.argv[2:])\nsys.exit(7)\n")
    words = ["exec", "--method", "grid", "--keep", "4", "--json", str(tmp_path / "numbers.json")]
    done = subprocess.run(
        [sys.executable, "-m", "tokprune", *words, "--", "python", path, str(folder), "--keep", "9",
         "-m", "x"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    model = tokprune.load(folder, "grid", keep=4)
    inputs = tiny.make_inputs(model, [[3, "image", 4]])
    own = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, -3:].tolist()
    assert done.stdout.strip() == f"{own} ['--keep', '9', '-m', 'x']"
    assert f"{tiny.PATCHES} -> 4" in done.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    [count] = numbers["models"]
    assert (count["prompts"], count["before"], count["after"]) == (1, tiny.PATCHES, 4)
    assert numbers["exit_code"] == 7
    assert numbers["problems"] == []


def test_every_process_that_a_script_starts(folder: Path, script: Any, tmp_path: Path) -> None:
    """Forked, spawned, started as a program, and the script itself."""
    path = script(
        "import multiprocessing, subprocess\n"
        "if __name__ == '__main__' and sys.argv[2:] != ['alone']:\n"
        "    answer(sys.argv[1])\n"
        "    torch.set_num_threads(1)\n"
        "    for kind in ('fork', 'spawn'):\n"
        "        with multiprocessing.get_context(kind).Pool(1) as pool:\n"
        "            pool.map(answer, [sys.argv[1]])\n"
        "    subprocess.run([sys.executable, __file__, sys.argv[1], 'alone'], check=True)\n"
        "elif __name__ == '__main__':\n"
        "    answer(sys.argv[1])\n"
    )
    code, events = run_patched([path, str(folder)], Grid(keep=4), strict=True)
    assert code == 0
    verdict = Verdict.of(events)
    assert not verdict.problems
    [count] = verdict.models
    assert (count.loaded, count.prompts, count.after) == (4, 4, 16)
    assert len({event["process"] for event in events}) == 4


def test_workers_of_torchrun_and_accelerate(folder: Path, script: Any) -> None:
    path = script("answer(sys.argv[1])\n")
    for launcher in (
        ["torchrun", "--standalone", "--nproc-per-node", "2"],
        ["accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no"],
    ):  # fmt: skip
        workers = 2 if launcher[0] == "torchrun" else 1
        code, events = run_patched([*launcher, path, str(folder)], Grid(keep=4), strict=True)
        assert code == 0
        verdict = Verdict.of(events)
        assert not verdict.problems
        assert [count.prompts for count in verdict.models] == [workers]


def test_a_method_that_does_not_fit(folder: Path, script: Any) -> None:
    """A strict run stops where the model is loaded; the other goes on with it as it is."""
    method = FastV(keep=4, prune_before=99)
    path = script("answer(sys.argv[1])\n")
    code, events = run_patched([path, str(folder)], method, strict=True)
    assert code == 1
    [problem, _] = Verdict.of(events).problems
    assert "could not be patched: ValueError" in problem
    code, events = run_patched([path, str(folder)], method, strict=False)
    assert code == 0
    assert Verdict.of(events).problems[0] == problem


def test_an_environment_without_tokprune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs there as before, its own ``sitecustomize`` first of all."""
    (tmp_path / "sitecustomize.py").write_text(f"open({str(tmp_path / 'seen')!r}, 'w')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    python = str(Path(sys.base_prefix) / "bin" / "python3")
    code, events = run_patched([python, "-c", "import sys; sys.exit(4)"], Grid(keep=4), True)
    assert code == 4
    assert (tmp_path / "seen").exists()
    [problem] = Verdict.of(events).problems
    assert f"tokprune is not installed for {python}" in problem


def test_a_command_that_is_killed() -> None:
    code, _ = run_patched(["sh", "-c", "kill -9 $$"], Grid(keep=4), True)
    assert code == 137


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "9", "--", "x.py"], "give --method"),
        (["--method", "grid", "--keep", "9"], "what to run is missing"),
        (["--method", "grid", "--keep", "9", "--", "-m"], "what to run is missing"),
        (["--method", "gird", "--keep", "9", "--", "x.py"], "Did you mean 'grid'"),
        (["--method", "grid", "--keep", "9", "--", "no-such-program"], "no such program"),
        (["--method", "grid", "--keep", "9", "--json", "no/x", "--", "x.py"], "no such folder"),
        (["--setting", "s.json", "--keep", "9", "--", "x.py"], "--setting names its method"),
        (["--method", "grid", "-m", "x"], "-m"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from tokprune.cli import app

    with pytest.raises(SystemExit) as stop:
        app(["exec", *arguments])
    assert stop.value.code == 2
    err = capfd.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_fails_where_nothing_was_compressed(capfd: pytest.CaptureFixture[str]) -> None:
    from tokprune.cli import app

    for strict, code in (("--strict", 3), ("--no-strict", 0)):
        with pytest.raises(SystemExit) as stop:
            app(["exec", "--method", "grid", "--keep", "9", strict, "--", "python", "-c", "pass"])
        assert stop.value.code == code
        assert "NOT COMPRESSED: no supported model was loaded" in capfd.readouterr().err


def test_counts_under_torch_compile() -> None:
    """Prefills are counted, and what the compiler runs does not break its graphs."""
    model = tiny.llava()
    trace = tokprune.patch(model, "grid", keep=4)
    asked: list[tuple[str, int]] = []
    watch_text(model, lambda *told: asked.append(told))
    inputs = tiny.make_inputs(model, [[3, "image", 4]])
    plain = model(**inputs).logits
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs).logits, plain, atol=1e-5)
    assert trace.prefills == 2
    assert not asked
