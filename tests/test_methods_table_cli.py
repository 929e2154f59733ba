"""`tokprune methods --model`: which method works on which model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_processor

from tokprune.api import patch, unpatch
from tokprune.cli import app
from tokprune.cli.fits import fits
from tokprune.cli.known_models import family_names
from tokprune.families import bind
from tokprune.methods import available_methods, make_method
from tokprune.testing import tiny_family


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            app([*map(str, args)])
        return (int(caught.value.code or 0), *capsys.readouterr())  # type: ignore[return-value]

    return call


@pytest.mark.parametrize("family", ["llava-1.5", "llava-onevision", "qwen2.5-vl", "gemma3"])
def test_what_the_table_says_is_what_patching_does(family: str) -> None:
    model = tiny_family(family).build()
    for fit in fits(bind(model).facts):
        if fit.status == "refused":
            assert fit.why, fit
            with pytest.raises(Exception, match=r"\w"):
                patch(model, make_method(fit.method, keep=0.5))
            continue
        assert (fit.status == "substitute") == bool(fit.why), fit
        for budget in ({"keep": 0.25}, {"keep": 0.5}, {"keep": 0.75}, {}):
            try:
                patch(model, make_method(fit.method, **fit.options, **budget))
            except (ValueError, TypeError):
                continue
            unpatch(model)
            break
        else:
            pytest.fail(f"{fit} cannot be patched")


def test_one_family_in_words(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("methods", "--model", "gemma3")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "works" in lines["divprune"]
    assert "refused" in lines["pitome"]
    assert "inside the vision encoder" in lines["pitome"]
    assert "works, otherwise" in lines["todre"]
    assert set(available_methods()) <= set(lines)


def test_several_as_a_matrix_with_notes(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("methods", "[dp]*", "--model", "llava-1.5", "--model", "internvl")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "✓" in rows["llava-1.5"]
    assert "–" in rows["internvl"]
    assert "fastv" not in rows["model"]
    assert "works inside the vision encoder" in out


def test_all_as_json(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("methods", "--model", "all", "--json")
    assert code == 0
    told = json.loads(out)
    assert list(told) == family_names()
    for family, entries in told.items():
        assert {entry["method"] for entry in entries} == set(available_methods()), family
        works = {entry["method"] for entry in entries if entry["status"] != "refused"}
        # what selects at the language-model input or in the decoder works everywhere
        assert {"divprune", "random", "grid", "fastv", "dart", "pyramiddrop"} <= works, family


def test_a_model_folder_and_a_class(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    tiny_processor.save(tmp_path)
    code, out, _ = run("methods", "fastv*", "--model", tmp_path, "--json")
    assert code == 0
    (told,) = json.loads(out).values()
    assert told == [{"method": "fastv", "status": "works", "why": "", "options": {}}]
    code, out, _ = run("methods", "--model", "Gemma3ForConditionalGeneration", "--json")
    assert code == 0
    by_hand = fits(bind(tiny_family("gemma3").build()).facts)
    assert [
        (e["method"], e["status"]) for e in json.loads(out)["Gemma3ForConditionalGeneration"]
    ] == [(f.method, f.status) for f in by_hand]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("qwen2.5-v", "did you mean qwen2.5-vl?"),
        ("zzz", "families: llava-1.5, "),
        ("/no/such", "no such folder"),
        ("MllamaForConditionalGeneration", "cross-attention"),
    ],
)
def test_unknown_and_refused_models(
    run: Callable[..., tuple[int, str, str]], model: str, told: str
) -> None:
    code, out, err = run("methods", "--model", model)
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: --model {model}: ")
    assert told in err
