"""Recommendations from synthetic runs, and settings that become methods again."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_run
import methods_table
import pytest

import tokprune
from tokprune.cli import app
from tokprune.eval.recommend import Recommendation
from tokprune.eval.recommend import recommend as recommend_slowly
from tokprune.eval.report import analyse, load_run
from tokprune.methods import ToMe, available_methods, make_method
from tokprune.methods.base import Method
from tokprune.methods.setting import load_setting, save_setting

COUNT = 180


def recommend(folder: Path, **limits: Any) -> Recommendation:
    """With few resamples: intervals are tested elsewhere."""
    return recommend_slowly(folder, draws=200, **limits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run.make_run(
        tmp_path_factory.mktemp("run"), count=COUNT, methods=("divprune", "fastv", "todre"),
        budgets=(16, 36, 64, 144, 288), chatter=0.0,
    )  # fmt: skip


def _real(folder: Path) -> Path:
    """Give the trials options and texts of real methods (the fake ones have stand-ins)."""
    run = json.loads((folder / "run.json").read_text())
    made = {c["trial"]: make_method(c["method"], keep=int(c["budget"])) for c in run["trials"]
            if c["method"] is not None}  # fmt: skip
    rows = [json.loads(x) for x in (folder / "rows.jsonl").read_text().splitlines()]
    for trial in run["trials"]:
        if trial["trial"] in made:
            trial["options"] = _options(made[trial["trial"]])
            trial["repr"] = repr(made[trial["trial"]])
    from tokprune.eval.sweep.identity import row_id

    trials = {c["trial"]: c for c in run["trials"]}
    for row in rows:
        row["row"] = row_id(run, trials[row["trial"]], row["item"], row["task"])
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def _options(method: Method) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}


@functools.cache
def _all(folder: Path) -> list[Any]:
    return [r for r in analyse(load_run(folder), draws=20).results
            if r.point.variant not in ("none", "downsample")]  # fmt: skip


# ------------------------------------------------------------------------------ choice


@pytest.mark.parametrize("minimise", ["flops", "latency", "tokens"])
@pytest.mark.parametrize("drop", [0.03, 0.08, 0.3])
def test_cheapest_within_a_drop(folder: Path, drop: float, minimise: Any) -> None:
    found = recommend(folder, max_drop=drop, minimise=minimise)
    fitting = [r for r in _all(folder) if r.drop <= drop]
    least = min(r.cost(minimise) for r in fitting)
    assert found.result.cost(minimise) == least
    assert found.result.accuracy == max(r.accuracy for r in fitting if r.cost(minimise) == least)
    assert minimise in found.result.on
    evidence = found.setting["evidence"]
    assert evidence["drop"] <= drop
    assert evidence["unpruned"] - evidence["accuracy"] == pytest.approx(evidence["drop"])
    assert evidence["latency"] == found.result.cost("latency")
    assert json.loads(json.dumps(found.setting, allow_nan=False)) == found.setting


@pytest.mark.parametrize(
    "limits", [{"max_tokens": 64}, {"max_latency": 0.036}, {"max_tokens": 40, "max_latency": 0.034}]
)
def test_most_accurate_under_costs(folder: Path, limits: dict[str, Any]) -> None:
    found = recommend(folder, **limits)
    kinds = {"max_tokens": "tokens", "max_latency": "latency"}
    fitting = [r for r in _all(folder) if all(r.cost(kinds[k]) <= v for k, v in limits.items())]
    assert found.result.accuracy == max(r.accuracy for r in fitting)


def test_both_kinds_of_limits(folder: Path) -> None:
    found = recommend(folder, min_accuracy=0.7, max_tokens=100)
    assert found.result.accuracy >= 0.7
    assert found.result.point.tokens <= 100
    cheaper = [r for r in _all(folder) if r.cost("flops") < found.result.cost("flops")]
    assert all(r.accuracy < 0.7 for r in cheaper)


def test_confidence_costs_more(folder: Path) -> None:
    plain = recommend(folder, max_drop=0.1)
    sure = recommend(folder, max_drop=0.1, confident=True)
    assert sure.result.drop_interval[1] <= 0.1 < plain.result.drop_interval[1]
    assert sure.result.cost("flops") >= plain.result.cost("flops")
    assert any("95 % interval" in line for line in plain.warnings)
    assert not any("95 % interval" in line for line in sure.warnings)
    accurate = recommend(folder, min_accuracy=0.8, confident=True)
    assert accurate.result.interval[0] >= 0.8


def test_a_winning_control_is_named(tmp_path: Path) -> None:
    run = fake_run.make_run(tmp_path, count=180, methods=("mustdrop",), budgets=(64,))
    found = recommend(run, max_tokens=64)
    assert found.result.point.variant == "pool"  # downsample is more accurate, and no setting
    assert found.setting["evidence"]["control"] is True
    assert any("control 'pool'" in line for line in found.warnings)
    assert found.setting["method"] == "pool"


def test_limit_below_the_noise(folder: Path) -> None:
    gap = analyse(load_run(folder), draws=20).noise_gap
    assert gap is not None
    assert gap > 0
    found = recommend(folder, max_drop=gap / 2)
    assert any("below the noise floor" in line for line in found.warnings)
    assert not any("noise" in line for line in recommend(folder, max_drop=0.3).warnings)


def test_incomplete_points_do_not_compete(tmp_path: Path) -> None:
    run = fake_run.make_run(tmp_path, count=90, methods=("todre",), controls=(), budgets=(64, 144),
                            missing=3)  # fmt: skip
    assert recommend(run, max_tokens=200).result.point.budget == 64


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "at least one limit"),
        ({"max_drop": 2.0}, r"max_drop=2\.0 should be in \[0, 1\)"),
        ({"max_drop": -0.1}, "max_drop=-0.1"),
        ({"max_drop": math.nan}, "max_drop=nan"),
        ({"max_latency": 0.0}, "max_latency=0.0"),
        ({"max_tokens": -3}, "max_tokens=-3"),
        ({"min_accuracy": 1.5}, "min_accuracy=1.5"),
        ({"max_drop": 0.1, "minimise": "energy"}, "minimise='energy'"),
        ({"max_tokens": 3}, r"misses max-tokens: \w+ @ 16, accuracy .* 16 tokens"),
        ({"max_drop": 0.001, "max_tokens": 64}, r"misses max-\w+: todre @ \d+, accuracy .* tokens"),
        ({"max_latency": 0.001}, "misses max-latency"),
    ],
)
def test_refusals(folder: Path, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recommend(folder, **limits)


def test_refuses_latency_that_was_not_measured(tmp_path: Path) -> None:
    run = fake_run.make_run(tmp_path, count=45, budgets=(64,), latency=False)
    with pytest.raises(ValueError, match="latency was not measured"):
        recommend(run, max_latency=1.0)
    with pytest.raises(ValueError, match="latency was not measured"):
        recommend(run, max_drop=0.9, minimise="latency")
    assert recommend(run, max_drop=0.9).setting["evidence"]["latency"] is None


def test_refuses_a_run_of_controls_alone(tmp_path: Path) -> None:
    run = fake_run.make_run(tmp_path, count=18, methods=(), controls=("downsample",), budgets=(64,))
    with pytest.raises(ValueError, match="no method has all its answers"):
        recommend(run, max_drop=0.9)
    with pytest.raises(ValueError, match="no such folder"):
        recommend(tmp_path / "none", max_drop=0.9)


# ------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("case", methods_table.ALL)
@pytest.mark.parametrize("text", [True, False])
def test_every_method_round_trips(case: str, text: bool, tmp_path: Path) -> None:
    name, options = methods_table.ALL[case]
    method = make_method(name, **options)
    setting: dict[str, Any] = {"schema": 2, "method": name, "options": _options(method)}
    if text:
        setting["repr"] = repr(method)
    save_setting(setting, tmp_path / "s.json")
    again = load_setting(tmp_path / "s.json")
    assert type(again) is type(method)
    assert again == method
    assert load_setting(json.loads(json.dumps(setting))) == method


@pytest.mark.parametrize("name", available_methods())
def test_every_preset_round_trips(name: str) -> None:
    cls = available_methods()[name]
    for preset in cls.presets:
        method = cls(**preset.options)
        setting = {"schema": 2, "method": name, "options": _options(method), "repr": repr(method)}
        again = load_setting(json.loads(json.dumps(setting)))
        assert repr(again) == repr(method)


@pytest.mark.parametrize("r", [(4, 0.5), [4, 4], [4, 4, 4]])
def test_lists_and_tuples_that_mean_different_things(r: Any) -> None:
    """ToMe's (count, inflection) is a tuple, its list of counts is not: repr tells them apart."""
    method = ToMe(r=r)
    setting = {"schema": 2, "method": "tome", "options": _options(method), "repr": repr(method)}
    assert load_setting(json.loads(json.dumps(setting))) == method


def test_recommended_setting_is_a_method(tmp_path: Path) -> None:
    run = _real(fake_run.make_run(tmp_path, count=90, methods=("todre", "divprune"), budgets=(64,)))
    found = recommend(run, max_tokens=64)
    method = load_setting(json.loads(json.dumps(found.setting)))
    assert method == tokprune.ToDRE(keep=64)
    assert found.setting["tokprune"] == tokprune.__version__
    assert found.setting["model"]["hash"] == "hash-of-tiny"


GOOD: dict[str, Any] = {"schema": 2, "method": "random", "options": {"keep": 9}}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({**GOOD, "schema": 3}, "schema=3 is unknown"),
        ({}, "schema=None is unknown"),
        ({**GOOD, "method": "nope"}, "method='nope' is unknown"),
        ({**GOOD, "method": None}, "'method'=None"),
        ({**GOOD, "options": [1]}, "'options'="),
        ({**GOOD, "options": {"kep": 9}}, "Did you mean 'keep'"),
        ({**GOOD, "options": {}}, "'keep' is required"),
        ({**GOOD, "options": {"keep": -1}}, "keep=-1"),
        ({**GOOD, "repr": "Random(keep=8)"}, r"'options' make Random\(keep=9"),
    ],
)
def test_bad_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_setting(setting)


def test_bad_setting_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_setting(tmp_path / "none.json")
    for text, message in (("{", "not valid JSON"), ("[]", "JSON object, is list")):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_setting(tmp_path / "s.json")
    with pytest.raises(TypeError, match="keep='x'"):
        load_setting({**GOOD, "options": {"keep": "x"}})


# ------------------------------------------------------------------------------ command line


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    def run(*args: Any) -> tuple[Any, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            app(["recommend", *map(str, args)])
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return run


def test_cli(folder: Path, tmp_path: Path, call: Any) -> None:
    target = tmp_path / "setting.json"
    code, out, err = call(folder, "--max-drop", "10%", "--out", target)
    assert code == 0
    assert "accuracy" in out
    assert str(target) in out
    assert err.startswith("Warning: the drop of")
    code, text, _ = call(folder, "--max-drop", "0.1", "--json")
    assert code == 0
    assert json.loads(text) == json.loads(target.read_text())
    code, text, _ = call(folder, "--max-latency", "36ms", "--max-tokens", 64, "--json")
    assert json.loads(text)["evidence"]["latency"] <= 0.036
    assert call(folder, "--max-latency", "0.036s", "--max-tokens", 64, "--json")[1] == text
    code, text, _ = call(folder, "--min-accuracy", "75%", "--minimise", "latency", "--json")
    assert json.loads(text)["evidence"]["accuracy"] >= 0.75


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "at least one limit: --max-drop"),
        (["--max-drop", "much"], "--max-drop 'much' should be a share"),
        (["--max-drop", "2"], "between 0 and 100 %"),
        (["--max-latency", "120"], "a time with its unit"),
        (["--max-latency", "-3ms"], "a time with its unit"),
        (["--max-drop", "2%", "--minimise", "energy"], "energy"),
        (["--max-tokens", "1"], "no setting meets the limits; the nearest misses max-tokens"),
        (["--max-drop", "2%", "--out", "nowhere/at/all.json"], "no such folder"),
    ],
)
def test_cli_bad_input(folder: Path, call: Any, args: list[str], message: str) -> None:
    code, out, err = call(folder, *args)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert message in err
