"""Budgets and options as people type them: the same words everywhere, bad ones named."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_processor
import torch
from fake_run import make_run

import tokprune
from tokprune.cli import BadInput, app, parse_keep, parse_options
from tokprune.cli.values import parse_amount
from tokprune.eval.sweep.budgets import parse_budget
from tokprune.methods import available_methods, make_method

GOOD = [
    ("64", 64), (" 64 ", 64), ("1", 1), ("1/4", 0.25), ("1 / 4", 0.25), ("2/8", 0.25),
    ("0.25", 0.25), (".25", 0.25), ("2.5e-1", 0.25), ("25%", 0.25), ("25 %", 0.25),
    ("12.5%", 0.125), ("1/9", 1 / 9), ("1.0", 1.0), ("100%", 1.0), ("4/4", 1.0),
]  # fmt: skip
BAD = [
    "", " ", "0", "-1", "-0.5", "+64", "0.0", "0%", "0/4", "1/0", "0/0", "5/4", "1/4/2", "120%",
    "1.5", "nan", "inf", "-inf", "1e400", "1e-999", "x", "1/x", "64 tokens", "25%%", "%", "/",
    "1/4%", "1_000", "0x10", "True", "None", "[64]", "٦٤", "9" * 400, "1/" + "9" * 4000,
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), GOOD)
def test_one_word_is_the_same_everywhere(text: str, value: float) -> None:
    for parsed in (
        parse_keep(text), parse_keep(text, schedule=False), parse_amount(text, "--at"),
        parse_options([f"keep={text}"])["keep"],
    ):  # fmt: skip
        assert (type(parsed), parsed) == (type(value), value)
    budget = parse_budget(text)
    assert (budget.share if budget.count is None else budget.count) == value


@pytest.mark.parametrize("text", BAD)
def test_bad_budgets_are_named(text: str) -> None:
    for parse in (
        parse_keep, lambda t: parse_keep(t, schedule=False),
        lambda t: parse_amount("x" if t == "1.5" else t, "--keep"),  # 1.5 tokens are an amount
    ):  # fmt: skip
        with pytest.raises(BadInput, match=r"^--keep .*should be ") as caught:
            parse(text)
        assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match=r"^keep=.*should be "):
        parse_budget(text)


def test_schedules() -> None:
    assert parse_keep("1/2, 25%,0.125,8") == (0.5, 0.25, 0.125, 8)
    assert parse_keep("0.5,0") == (0.5, 0)
    for text in ("0.5,", "0.5,,4", "0.5,x", "0.5,120%"):
        with pytest.raises(BadInput, match=r"--keep .*schedule"):
            parse_keep(text)
    with pytest.raises(BadInput, match=r"--keep '1/2,1/4' should be"):
        parse_keep("1/2,1/4", schedule=False)


def test_amounts_need_not_be_whole() -> None:
    assert parse_amount("96.5", "--at") == 96.5
    assert parse_amount(None, "--at") is None


def test_options_are_literals_or_text() -> None:
    assert parse_options(["a=true", "b=false", "c=None", "d=(1, 2)", "e=1if", "f=x", "g="]) == {
        "a": True, "b": False, "c": None, "d": (1, 2), "e": "1if", "f": "x", "g": "",
    }  # fmt: skip
    deep = "(" * 5000
    assert parse_options([f"a={deep}", "b={[]: 1}"]) == {"a": deep, "b": "{[]: 1}"}
    with pytest.raises(BadInput, match="--option keep='x' should be"):
        parse_options(["keep=x"])


# ---------------------------------------------------------------------------- methods


class Odd:
    def __repr__(self) -> str:
        return "Odd()"


WRONG: list[Any] = [
    None, "x", "", True, [], ["x"], [None], (), ("x",), {}, {"a": 1}, math.nan, math.inf, -math.inf,
    10**30, 10**400, -(2**70), 1e308, -1, 0, b"x", object, Odd(), 1j, (True,), (math.nan,), "1",
]  # fmt: skip


@pytest.mark.parametrize("name", available_methods())
def test_options_of_a_wrong_kind_are_named(name: str) -> None:
    """Refused with option, value and what would be right, or the method runs (or says what does not
    fit the model)."""
    cls, model = available_methods()[name], tiny.llava()
    inputs = tiny.make_inputs(model, [[4, "image", 6]])
    refused = 0
    for field in dataclasses.fields(cls):
        for value in WRONG:
            options = {"keep": 9, **cls.options_for_depth(8), field.name: value}
            try:
                made = make_method(name, **options)
            except (ValueError, TypeError) as error:
                refused += 1
                said = str(error)
                assert field.name in said, (field.name, value)
                parts = value if isinstance(value, (list, tuple)) else [value]
                named = any(repr(part) in said for part in (value, *parts))
                assert named or said.startswith("give exactly one"), said
                continue
            if callable(value):
                continue  # an option may be a function
            try:
                with torch.no_grad(), tokprune.compress(model, made):
                    logits = model(**inputs).logits
            except ValueError:  # a count above what an image has, a method for videos, …
                continue
            assert torch.isfinite(logits).all(), (field.name, value)
    assert refused > 10


# ------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_processor.save(tmp_path_factory.mktemp("words") / "model")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    def run(*args: Any) -> tuple[Any, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([*map(str, args)])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.mark.parametrize("text", ["x", "0", "1/0", "120%", "1/4/2", "nan", "-1"])
def test_every_command_names_the_option(call: Any, folder: Path, tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "run")
    for args in (
        ("run", "--model", folder, "--prompt", "x", "--method", "random", f"--keep={text}"),
        ("bench", "--model", folder, "--methods", "random", f"--keep={text}"),
        ("sweep", "--model", folder, "--out", tmp_path / "new", f"--keep={text}"),
        ("reproduce", "--paper", "todre", f"--keep={text}"),
        ("report", run, f"--at={text}"),
        ("recommend", run, f"--max-tokens={text}"),
    ):
        code, out, err = call(*args)
        assert (code, out) == (2, ""), (args, err)
        (line,) = err.strip().splitlines()
        assert text in line
        assert "keep" in line or "--at" in line or "--max-tokens" in line
    assert not (tmp_path / "new").exists()


def test_installed_command_takes_a_fraction_and_names_options(folder: Path) -> None:
    script = Path(sys.executable).with_name("tokprune")
    base = [script, "run", "--model", folder, "--prompt", "x", "--max-new-tokens", "2"]
    done = subprocess.run(
        [*base, "--method", "todre", "--keep", "1/4", "--option", "tau=x"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.strip().splitlines()
    assert "tau='x' should be" in line


def test_run_takes_all_the_words(call: Any, folder: Path) -> None:
    for text in ("1/4", "0.25", "25%"):
        code, out, err = call(
            "run", "--model", folder, "--prompt", "x", "--max-new-tokens", 2, "--json",
            "--method", "random", "--keep", text,
        )  # fmt: skip
        assert code == 0, err
        assert "Random(keep=0.25" in out
