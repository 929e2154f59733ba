"""Methods and families of other packages: listed, run, swept and reported like those built in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import sweep_case as case

METHODS = '''
from dataclasses import dataclass

from tokprune.methods import register_method
from tokprune.methods.scoring import PromptScorer


@dataclass(frozen=True)
class LargestNorm(PromptScorer):
    """Keeps the tokens of the largest norm."""

    name = "largest-norm"
    variants = ({"positions": "preserve"},)

    def score(self, image):
        return image.features.norm(dim=-1)


@dataclass(frozen=True)
class Random(PromptScorer):
    name = "random"

    def score(self, image):
        return image.features[:, 0]
'''
FAMILY = """
from transformers import LlavaForConditionalGeneration

from tokprune.families.llava import Llava


class ToyModel(LlavaForConditionalGeneration):
    pass


class Toy(Llava):
    name = "toy"
    model_classes = ("ToyModel",)
"""
ENTRY_POINTS = """
[tokprune.methods]
broken = toy_package.nowhere:Method
largest-norm = toy_package.methods:LargestNorm
taken = toy_package.methods:Random

[tokprune.families]
toy = toy_package.families:Toy
"""
#: every command in one process: starting one takes seconds
PROGRAM = """
import contextlib, io, json, sys
import torch, transformers
from tokprune.cli import app
from tokprune.families import bind
from toy_package.families import ToyModel

model, image, questions, run = sys.argv[1:]


def call(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            app(list(words))
        except SystemExit as stop:
            assert not stop.code, (words, stop.code)
    return out.getvalue()


said = {
    "methods": json.loads(call("methods", "--json")),
    "run": json.loads(call("run", "--model", model, "--prompt", "what is in the lake ?", "--image",
                           image, "--method", "largest-norm", "--keep", "9", "--device", "cpu",
                           "--max-new-tokens", "2", "--json")),
    "sweep": call("sweep", "--model", model, "--benchmark", questions, "--out", run, "--methods",
                  "largest-norm", "--keep", "9", "--variants", "--no-noise", "--no-latency",
                  "--no-controls", "--device", "cpu", "--max-new-tokens", "2"),
    "report": call("report", run),
}
with torch.device("meta"):
    toy = ToyModel(transformers.AutoConfig.from_pretrained(model))
said["family"] = bind(toy).family.name
sys.stdout.write(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the commands print with the package installed; ``run``: the run folder."""
    root = tmp_path_factory.mktemp("plugins")
    package = root / "site" / "toy_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "methods.py").write_text(METHODS)
    (package / "families.py").write_text(FAMILY)
    about = root / "site" / "toy_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    model = case.make_model(root / "model", layers=4)
    questions = case.make_benchmark(root / "bench", items=3)
    paths = [str(root / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), str(root / "bench" / "0.png"), str(questions),
         str(root / "run")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr, "folder": root / "run"}


def test_a_method_of_another_package_is_listed_and_runs(said: dict[str, Any]) -> None:
    (method,) = (m for m in said["methods"] if m["name"] == "largest-norm")
    assert method["class"] == "LargestNorm"
    assert said["run"]["method"].startswith("LargestNorm(keep=9")
    assert len(said["methods"]) > 15


def test_a_family_of_another_package_covers_its_classes(said: dict[str, Any]) -> None:
    assert said["family"] == "toy"


def test_a_broken_plug_in_and_a_taken_name_are_said_by_whom(said: dict[str, Any]) -> None:
    assert "'broken' of package 'toy-package' cannot be loaded" in said["stderr"]
    assert "package 'toy-package'" in said["stderr"]
    assert "is taken by tokprune.methods.random.Random" in said["stderr"]


def test_sweep_and_report_know_it_and_its_variants(said: dict[str, Any]) -> None:
    run = json.loads((said["folder"] / "run.json").read_text())
    variants = {trial["variant"] for trial in run["trials"] if trial["status"] == "ok"}
    assert variants == {"none", "largest-norm", "largest-norm+positions=preserve"}
    assert said["sweep"].strip().endswith("9 answers in 3 trials")
    assert "largest-norm" in said["report"]
    assert "largest-norm+positions=preserve" in (said["folder"] / "report/report.html").read_text()
