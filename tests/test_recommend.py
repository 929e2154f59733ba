"""Recommendations from synthetic runs, and settings that become methods again."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_run
import methods_table
import pytest

import tokprune
from tokprune.cli import app
from tokprune.eval.halves import share_of_images
from tokprune.eval.recommend import Recommendation
from tokprune.eval.recommend import recommend as recommend_slowly
from tokprune.eval.report import analyse, load_run
from tokprune.eval.report.data import part_of
from tokprune.methods import ToMe, available_methods, make_method
from tokprune.methods.base import Method
from tokprune.methods.setting import load_setting, save_setting

COUNT = 180


def recommend(folder: Path, **limits: Any) -> Recommendation:
    """With few resamples: intervals are tested elsewhere. What is chosen, and reported, is by all
    questions, unless a test asks for halves."""
    return recommend_slowly(folder, draws=200, **{"same_questions": True, **limits})


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


# ------------------------------------------------------------------------------ other questions


def test_chosen_by_one_half_and_reported_on_the_other(folder: Path) -> None:
    """Each half by hand: the choice is the best of one, the numbers are those of the other."""
    data = load_run(folder)
    aside = share_of_images([(i.image, i.task) for i in data.items], 0.5, 0)
    others = {i.image for i in data.items} - aside
    first = analyse(part_of(data, others), draws=20)
    second = analyse(part_of(data, aside), draws=20)
    found = recommend(folder, max_tokens=64, same_questions=False)
    fitting = [r for r in first.results if r.cost("tokens") <= 64 and r.point.method]
    best = max(fitting, key=lambda r: r.accuracy)
    assert found.chosen.accuracy == best.accuracy
    assert found.result.point.trials == best.point.trials
    there = next(r for r in second.results if r.point.trials == best.point.trials)
    evidence = found.setting["evidence"]
    assert evidence["accuracy"] == found.result.accuracy == there.accuracy
    assert evidence["chosen_on"]["accuracy"] == best.accuracy
    assert evidence["questions"] + evidence["chosen_on"]["questions"] == len(data.items)
    again = recommend(folder, max_tokens=64, same_questions=False)
    assert again.setting == found.setting
    other = recommend(folder, max_tokens=64, same_questions=False, seed=1)
    assert other.setting["evidence"]["accuracy"] != evidence["accuracy"]


def test_a_choice_by_chance_is_not_flattered(tmp_path: Path) -> None:
    """Many settings that are all alike: the best of them has luck, which does not come back."""
    run = fake_run.make_run(tmp_path, count=180, methods=("todre",), controls=(), budgets=(64,))
    info = json.loads((run / "run.json").read_text())
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    trial = next(t for t in info["trials"] if t["method"] == "todre")
    own = [row for row in rows if row["trial"] == trial["trial"]]
    rng = random.Random(3)
    from tokprune.eval.sweep.identity import row_id

    for number in range(40):
        name = f"todre+tau={number}@64"
        copy = {**trial, "trial": name, "variant": name, "options": {"tau": number}}
        info["trials"].append(copy)
        for row in own:
            right = rng.random() < 0.5
            answer = row["answers"][0] if right else "no idea"
            rows.append({**row, "trial": name, "score": float(right), "answer": answer,
                         "row": row_id(info, copy, row["item"], row["task"])})  # fmt: skip
    info["trials"].remove(trial)
    (run / "run.json").write_text(json.dumps(info))
    (run / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flattered = recommend(run, max_tokens=200).setting["evidence"]["accuracy"]
    honest = [
        recommend(run, max_tokens=200, same_questions=False, seed=seed).setting["evidence"]
        for seed in range(6)
    ]
    assert flattered > 0.55
    assert abs(sum(e["accuracy"] for e in honest) / 6 - 0.5) < 0.04
    assert all(e["chosen_on"]["accuracy"] > 0.55 for e in honest)


def test_a_limit_that_does_not_hold_on_the_other_half(folder: Path) -> None:
    said = [
        line
        for seed in range(8)
        for line in recommend(folder, max_drop=0.05, same_questions=False, seed=seed).warnings
    ]
    assert any("above the limit of 5.0" in line for line in said)


def test_reported_on_another_run(tmp_path: Path) -> None:
    choosing = fake_run.make_run(tmp_path / "a", count=90, methods=("todre",), budgets=(64, 144))
    other = fake_run.make_run(tmp_path / "b", count=90, methods=("todre",), budgets=(64, 144))
    with pytest.raises(ValueError, match=r"has \d+ images in common"):
        recommend(choosing, max_tokens=64, same_questions=False, report_on=other)
    _renamed(other, image="other-")
    found = recommend(choosing, max_tokens=64, same_questions=False, report_on=other)
    everything = recommend(choosing, max_tokens=64)
    assert found.chosen.accuracy == everything.result.accuracy
    evidence = found.setting["evidence"]
    assert (evidence["run"], evidence["chosen_on"]["run"]) == (str(other), str(choosing))
    with pytest.raises(ValueError, match="exclude each other"):
        recommend(choosing, max_tokens=64, report_on=other)
    less = fake_run.make_run(tmp_path / "c", count=90, methods=("todre",), budgets=(144,))
    _renamed(less, image="other-")
    with pytest.raises(ValueError, match="has no complete answers of"):
        recommend(choosing, max_tokens=64, same_questions=False, report_on=less)
    _renamed(less, image="", model="hash-of-another")
    with pytest.raises(ValueError, match="of the same weights"):
        recommend(choosing, max_tokens=64, same_questions=False, report_on=less)


def _renamed(folder: Path, image: str, model: str | None = None) -> None:
    """Other images, or another model, in a run folder."""
    from tokprune.eval.sweep.identity import row_id

    info = json.loads((folder / "run.json").read_text())
    info["model"]["hash"] = model or info["model"]["hash"]
    trials = {t["trial"]: t for t in info["trials"]}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["image"] = image + row["image"]
        row["row"] = row_id(info, trials[row["trial"]], row["item"], row["task"])
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_too_few_images_for_halves(tmp_path: Path) -> None:
    run = fake_run.make_run(tmp_path, count=9, methods=("todre",), budgets=(64,))
    with pytest.raises(ValueError, match="too few to put 50% of them aside: one side"):
        recommend(run, max_tokens=64, same_questions=False)


def test_halves_of_images() -> None:
    """Images stay whole, both sides have about as much of every task, order does not matter."""
    questions = [(f"i{n}", task) for n in range(60) for task in ("abc"[n % 3], "d")]
    aside = share_of_images(questions, 0.25, 0)
    assert len(aside) == 15
    for task in "abc":
        assert sum(own == task and image in aside for image, own in questions) == 5
    assert share_of_images(questions[::-1], 0.25, 0) == aside
    assert share_of_images(questions, 0.25, 1) != aside
    alone = [(f"i{n}", f"{n % 7} {n % 11}") for n in range(77)]  # every image of its own kind
    with pytest.raises(ValueError, match="77 images are too few"):
        share_of_images(alone, 0.5, 0)
    with pytest.raises(ValueError, match="no question of task"):
        share_of_images([("i", "a"), ("j", "b")], 0.5, 0)


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
    code, out, err = call(folder, "--max-drop", "10%", "--same-questions", "--out", target)
    assert code == 0
    assert "accuracy" in out
    assert "chosen by" not in out
    assert str(target) in out
    assert err.startswith("Warning: the drop of")
    code, text, _ = call(folder, "--max-drop", "0.1", "--same-questions", "--json")
    assert code == 0
    assert json.loads(text) == json.loads(target.read_text())
    code, text, _ = call(folder, "--max-latency", "36ms", "--max-tokens", 64, "--json")
    assert json.loads(text)["evidence"]["latency"] <= 0.036
    assert call(folder, "--max-latency", "0.036s", "--max-tokens", 64, "--json")[1] == text
    code, text, _ = call(folder, "--min-accuracy", "75%", "--minimise", "latency", "--json")
    assert json.loads(text)["evidence"]["chosen_on"]["accuracy"] >= 0.75
    code, text, _ = call(folder, "--max-tokens", 64)
    assert "chosen by 90 questions (accuracy" in text
    assert "reported on 90 about other images" in text


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
        (["--max-drop", "2%", "--report-on", "x", "--same-questions"], "exclude each other"),
        (["--max-drop", "2%", "--report-on", "nowhere"], "no such folder"),
    ],
)
def test_cli_bad_input(folder: Path, call: Any, args: list[str], message: str) -> None:
    code, out, err = call(folder, *args)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert message in err
