"""Tuning: what is searched, races, studies that go on, and the report on other questions."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_run
import pytest
import sweep_case as case
from pictures import landscape

import tokprune
from tokprune.cli import app
from tokprune.errors import CompositionError
from tokprune.eval.report import analyse, load_run
from tokprune.eval.sweep import evaluator, read_run, run_sweep
from tokprune.eval.sweep.budgets import parse_budget
from tokprune.eval.sweep.progress import Progress
from tokprune.eval.tune import race as racing
from tokprune.eval.tune.candidate import Candidate, Part
from tokprune.eval.tune.questions import Questions, in_turns
from tokprune.eval.tune.result import Finalists, _adjusted, _contest
from tokprune.eval.tune.settings import TuneSettings
from tokprune.eval.tune.space import (
    STRUCTURE,
    Budgets,
    Choice,
    Layers,
    Number,
    Space,
    dimensions,
)
from tokprune.methods import available_methods, image_methods, make_method
from tokprune.methods.composed import Composed
from tokprune.methods.setting import load_setting, save_setting, setting_of

pytest.importorskip("optuna", reason="tuning needs optuna: pip install 'tokprune[tune]'")
from tokprune.eval.tune.run import STUDY_FILE, run_tune
from tokprune.eval.tune.study import Known, open_storage
from tokprune.eval.tune.target import LatencyTarget

METHODS = ("divprune", "fastv", "random", "visionzip")
IMAGES, PER_IMAGE = 14, 3

# ------------------------------------------------------------------------------ the space


def _facts(home: Path) -> Any:
    return evaluator.LoadedModel.load(str(home / "model"), "auto", "cpu", False).facts


def test_dimensions_come_from_annotations() -> None:
    methods = available_methods()
    fastv = dimensions(methods["fastv"])
    assert fastv["prune_before"] == Layers(0, several=True, optional=False)
    assert fastv["positions"] == Choice((*fastv["positions"].values[:-1], None))  # type: ignore[union-attr]
    assert "keep" not in fastv
    assert dimensions(methods["dart"])["prune_before"] == Layers(1, several=False, optional=False)
    assert dimensions(methods["dart"])["image_pivots"] == Number(1, 16, log=True, whole=True)
    assert dimensions(methods["flowcut"])["tower_keep"] == Budgets(optional=True)
    assert dimensions(methods["hired"])["alpha"] == Number(0, 1)
    assert dimensions(methods["todre"])["stage2"] == Choice((False, True))
    assert dimensions(methods["cdpruner"])["relevance"] == Choice(("text", "none"))
    assert "relevance_scope" not in dimensions(methods["cdpruner"])  # image, or the whole batch
    for cls in methods.values():
        assert "seed" not in dimensions(cls)


def test_a_method_says_what_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = available_methods()["hired"]
    monkeypatch.setattr(cls, "searched", {"alpha": (0.25, 0.5), "rounding": ()})
    assert dimensions(cls)["alpha"] == Choice((0.25, 0.5))
    assert "rounding" not in dimensions(cls)


def test_walks_make_methods_that_fit_together(home: Path) -> None:
    """Whatever is drawn either is a method, alone or composed, or is refused by name."""
    facts = _facts(home)
    space = Space.of(facts, list(image_methods()))
    assert "divprune" in space.prompt
    assert "fastv" in space.decoder
    rng = random.Random(0)

    def choose(name: str, dimension: Any, usual: Any) -> Any:
        if isinstance(dimension, Choice):
            return rng.choice(dimension.values)
        value = rng.uniform(dimension.low, dimension.high)
        return round(value) if dimension.whole else value

    sizes = set()
    for _ in range(300):
        candidate = space.walk(choose).seeking(parse_budget(9), 36)
        try:
            method = candidate.at(9, facts.decoder_layers)
        except ValueError:
            continue
        assert (method.name == "compose") == (len(candidate.parts) > 1) == (
            candidate.method == "compose"
        )  # fmt: skip
        sizes.add(len(candidate.parts))
        assert load_setting(setting_of(method)) == method
    assert sizes == {1, 2, 3}


def test_published_settings_are_points_of_the_space(home: Path) -> None:
    space = Space.of(_facts(home), list(image_methods()))
    for name in space.alone:
        known = Known(Candidate((Part(name, {}),), None))
        candidate = space.walk(known, known.candidate)
        assert [part.method for part in candidate.parts] == [name]
        for given in candidate.parts[0].options:
            assert given in {f.name for f in dataclasses.fields(available_methods()[name])}
        assert known.params["method"] == name
        assert not STRUCTURE & known.params.keys()
        keep = candidate.seeking(parse_budget(9), 36)
        usual = make_method(name, **{**space.usual[name], "keep": 9})
        assert keep.at(9, space.facts.decoder_layers) == usual


def test_budgets_of_earlier_stages_follow_the_one_that_is_sought() -> None:
    parts = (Part("visionzip", {}, {"keep": 2.0}), Part("fastv", {"prune_before": 1}))
    candidate = Candidate(parts, "size")
    made = candidate.seeking(parse_budget(9), 36).at(4, 4)
    assert isinstance(made, Composed)
    assert [m.keep for m in made.methods] == [18, 4]  # type: ignore[attr-defined]
    assert made.rectify is not None
    shares = candidate.seeking(parse_budget("25%"), 36).at(0.1, 4)
    assert [m.keep for m in shares.methods] == [0.5, 0.1]  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------ races


def _items(number: int, tasks: int = 2) -> list[Any]:
    return [SimpleNamespace(id=f"q{n}", task=f"t{n % tasks}") for n in range(number)]


def test_a_race_stops_the_slow_the_hopeless_and_the_faulty() -> None:
    items = _items(90)
    courses = racing.stages(items, 2)
    assert [len(course) for course in courses] == [10, 30, 90]
    right = {"best": 0.9, "good": 0.8, "poor": 0.1, "inert": 1.0, "a": 0.0, "b": 0.05, "c": 0.0}
    scores = {
        name: {item.id: float(n % 20 < 20 * share) for n, item in enumerate(items)}
        for name, share in right.items()
    }
    asked: dict[str, int] = dict.fromkeys(right, 0)

    def ask(names: Sequence[str], some: Sequence[Any]) -> None:
        for name in names:
            asked[name] += len(some)

    def run(names: Sequence[str], best: Any = None, through: int = 1) -> dict[str, racing.Runner]:
        asked.update(dict.fromkeys(right, 0))
        runners = [racing.Runner(name, "group") for name in names]
        racing.race(
            runners, courses, ask, scores.__getitem__,
            lambda name: "did nothing" if name == "inert" else None,
            {} if best is None else {"group": best}, through,
        )  # fmt: skip
        return {runner.id: runner for runner in runners}

    found = run(right)
    assert found["inert"].fault == found["inert"].out == "did nothing"
    assert asked["inert"] == 10
    assert found["best"].out is None
    assert asked["best"] == 90
    assert found["best"].steps[-1] == pytest.approx(racing.accuracy(scores["best"], items))
    assert "place" in (found["poor"].out or "")
    assert found["poor"].fault is None
    found = run(["good", "poor"], scores["best"], through=2)
    assert "worse than the best so far" in (found["poor"].out or "")
    assert found["good"].out is None or asked["good"] > 10


def test_questions_in_turns() -> None:
    items = [SimpleNamespace(id=f"{t}{n}", task=t) for t in "ab" for n in range(6)]
    mixed = in_turns(items, 0)
    assert [item.task for item in mixed] == ["a", "b"] * 6
    assert sorted(i.id for i in mixed) == sorted(i.id for i in items)
    assert in_turns(items, 1) != mixed == in_turns(items, 0)


# ------------------------------------------------------------------------------ whole studies


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and questions whose answers are what it says unpruned: to be accurate is to
    stay as it was."""
    root = tmp_path_factory.mktemp("tune")
    case.make_model(root / "model")
    folder = root / "bench"
    folder.mkdir()
    image = landscape()
    lines = []
    for n in range(IMAGES):
        image.rotate(7 * n).resize((36, 36)).save(folder / f"{n}.png")
        lines += [
            {"id": f"q{n}-{k}", "image": f"{n}.png", "task": task, "answer": "house",
             "question": " ".join(["a"] * (n % 5) + [question])}
            for k, (task, question) in enumerate(case.QUESTIONS.items())
        ]  # fmt: skip
    path = folder / "small.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = run_sweep(case.settings(root / "model", path, root / "plain", methods=("none",),
                                  batch_size=16))  # fmt: skip
    said = {row["item"]: row["answer"] for row in run.rows}
    path.write_text("".join(json.dumps({**x, "answer": said[x["id"]]}) + "\n" for x in lines))
    return root


def settings(home: Path, out: Path, **changes: Any) -> TuneSettings:
    small: dict[str, Any] = {
        "tokens": (18, 9), "trials": 4, "methods": METHODS, "population": 2, "rivals": 2,
        "sweep": {"device": "cpu", "max_new_tokens": 3, "calibrate": 2, "latency": False},
    }  # fmt: skip
    return TuneSettings(
        model=str(home / "model"), out=str(out), benchmark=str(home / "bench" / "small.jsonl"),
        **{**small, **changes},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A study that nothing disturbed."""
    return run_tune(settings(home, tmp_path_factory.mktemp("whole") / "run"))


def trials_of(folder: Path, name: str) -> list[Any]:
    import optuna

    study = optuna.load_study(storage=open_storage(folder / STUDY_FILE), study_name=name)
    return study.get_trials()


def content(folder: Path, name: str) -> list[tuple[Any, ...]]:
    """A study without times and without what an interruption leaves."""
    return [
        (t.user_attrs["entry"]["trial"], t.user_attrs["entry"]["repr"], t.state.name, t.value,
         sorted(t.intermediate_values.items()), t.user_attrs["round"], t.params)
        for t in trials_of(folder, name)
        if "entry" in t.user_attrs
    ]  # fmt: skip


def test_questions_are_apart(whole: Any, home: Path) -> None:
    chosen, held = read_run(whole.folder), read_run(whole.folder / "held-out")
    images = [{row["image"] for row in run.rows} for run in (chosen, held)]
    assert not images[0] & images[1]
    assert len(images[0]) + len(images[1]) == IMAGES
    assert len({row["item"] for row in held.rows}) == len(images[1]) * PER_IMAGE
    assert "50% of the images" in whole.how


def test_hopeless_trials_are_pruned(whole: Any) -> None:
    run = read_run(whole.folder)
    questions = run.info["benchmark"]["items"]
    answered = {name: len(run.rows_of(name)) for name in run.trials}
    for name in ("tokens-18", "tokens-9"):
        tried = [t for t in trials_of(whole.folder, name) if "same_as" not in t.user_attrs
                 and t.user_attrs["entry"]["status"] == "ok"]  # fmt: skip
        states = {t.state.name for t in tried}
        assert states == {"COMPLETE", "PRUNED"}
        for t in tried:
            n = answered[t.user_attrs["entry"]["trial"]]
            assert (n == questions) or t.state.name == "PRUNED"
        assert min(answered[t.user_attrs["entry"]["trial"]] for t in tried) < questions / 2
        assert sum(t.user_attrs["round"] >= 0 for t in tried) == 4


def test_the_report_says_what_the_held_out_run_says(whole: Any) -> None:
    told = json.loads((whole.folder / "tune.json").read_text())
    held = analyse(load_run(whole.folder / "held-out"), draws=20)
    by_trial = {r.point.trials[0]: r for r in held.results}
    for budget, target in zip(told["budgets"], (18, 9), strict=True):
        result = by_trial[budget["tuned"]["trial"]]
        assert budget["tuned"]["accuracy"] == pytest.approx(result.accuracy)
        assert result.point.measured["tokens_mean"] == pytest.approx(target, abs=0.5)
        assert len(budget["published"]) == 2
        best = max(b["chosen_by"] for b in budget["published"])
        assert budget["tuned"]["chosen_by"] >= best
        assert budget["best_is_published"] == (budget["gap"] is None)
    text = (whole.folder / "tune.md").read_text()
    assert told["verdict"] in text
    assert told["held_out"] in text


def test_settings_load(whole: Any, home: Path) -> None:
    for path in whole.settings.values():
        model = tokprune.load(home / "model", setting=path)
        value = json.loads(path.read_text())
        assert repr(load_setting(path)) == value["repr"]
        assert tokprune.is_patched(model)
        assert value["evidence"]["chosen_on"]["tried"] == 4


class Stop(Progress):
    """Interrupts after so many steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, steps: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_a_study_that_was_killed_goes_on_the_same(whole: Any, home: Path, tmp_path: Path) -> None:
    given = settings(home, tmp_path / "run")
    interrupted = 0
    for after in (3, 30, 20, 45):
        try:
            run_tune(given, progress=Stop(after))
        except KeyboardInterrupt:
            interrupted += 1
            if (path := tmp_path / "run" / STUDY_FILE).exists():
                with path.open("ab") as file:
                    file.write(b'{"op_code": 4, "wor')  # killed in the middle of a line
    assert interrupted >= 3
    tuned = run_tune(given)
    for name in ("tokens-18", "tokens-9"):
        assert content(tuned.folder, name) == content(whole.folder, name)
    for name, path in tuned.settings.items():
        assert load_setting(path) == load_setting(whole.settings[name])
    rows = [row["row"] for row in read_run(tuned.folder).rows]
    assert len(rows) == len(set(rows)) == len(read_run(whole.folder).rows)


def test_more_trials_and_budgets(home: Path, tmp_path: Path) -> None:
    small = {"methods": ("divprune", "random")}
    first = run_tune(settings(home, tmp_path / "run", tokens=(9,), trials=1, **small))
    before = content(first.folder, "tokens-9")
    more = run_tune(settings(home, tmp_path / "run", tokens=(9, "1/2"), trials=2, **small))
    after = content(more.folder, "tokens-9")
    assert after[: len(before)] == before
    assert len([t for t in after if t[5] >= 0 and t[2] in ("COMPLETE", "PRUNED")]) >= 2
    assert set(more.settings) == {"tokens-9", "tokens-1-2"}
    with pytest.raises(ValueError, match=r"begun with rivals=2, and now it is 1"):
        run_tune(settings(home, tmp_path / "run", tokens=(9,), rivals=1, **small))


def test_what_did_not_act_is_never_kept(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DivPrune's hooks are gone whenever it answers: it is as accurate as the unpruned model."""
    original: Callable[..., Any] = evaluator.generate_answers
    bare = evaluator.LoadedModel.load(str(home / "model"), "auto", "cpu", False).model

    def generate(loaded: Any, inputs: Any, most: int) -> Any:
        trace = tokprune.trace_of(loaded.model)
        acted = original(loaded, inputs, most)
        if trace is None or "DivPrune" not in trace.method:
            return acted
        return original(dataclasses.replace(loaded, model=bare), inputs, most)

    monkeypatch.setattr(evaluator, "generate_answers", generate)
    tuned = run_tune(settings(home, tmp_path / "run", tokens=(9,), trials=4, rivals=1,
                              methods=("divprune", "random")))  # fmt: skip
    tried = trials_of(tuned.folder, "tokens-9")
    own = [
        t for t in tried
        if "DivPrune" in t.user_attrs["entry"]["repr"] and "same_as" not in t.user_attrs
        and t.user_attrs["entry"]["status"] == "ok"
    ]  # fmt: skip
    assert own
    assert all(t.state.name == "PRUNED" and "fault" in t.user_attrs for t in own)
    assert not any(t.intermediate_values for t in own)
    assert "DivPrune" not in load_setting(tuned.settings["tokens-9"]).__repr__()


# ------------------------------------------------------------------------------ budgets of time


def test_a_limit_of_time_is_met_with_the_most_tokens() -> None:
    class Maker:
        calibrator = SimpleNamespace(visual_tokens=576.0)
        common: dict[str, Any] = {}  # noqa: RUF012

        def make(self, variant: Any, budget: Any, seed: int) -> Any:
            entry = {"status": "ok", "budget": budget.count, "reason": None, "trial": "x"}
            return SimpleNamespace(entry=entry, runs=True, id="x")

    target = LatencyTarget(Maker(), 0.1, None, 8)  # type: ignore[arg-type]
    object.__setattr__(target, "_seconds", lambda trial: 0.001 * trial.entry["budget"])
    ladder = sorted({max(1, round(576 ** (n / 16))) for n in range(17)})
    found = target.match(SimpleNamespace(name="x"))  # type: ignore[arg-type]
    assert found.entry["budget"] == max(step for step in ladder if step <= 100)
    object.__setattr__(target, "_seconds", lambda trial: 1.0)
    none = target.match(SimpleNamespace(name="x"))  # type: ignore[arg-type]
    assert none.entry["status"] == "unreachable"
    assert "nothing within 100 ms" in none.entry["reason"]


# ------------------------------------------------------------------------------ the verdict


def _judged(folder: Path, best: str, *rivals: str) -> Any:
    analysis = analyse(load_run(folder), draws=200)

    def finalist(trial: str, published: bool) -> Any:
        return SimpleNamespace(trial=trial, published=published, accuracy=0.5)

    found = Finalists(
        finalist(best, best in rivals), tuple(finalist(name, True) for name in rivals), {}
    )
    return _adjusted([_contest(analysis, found)])[0]


def test_to_win_is_to_beat_each_published_setting(tmp_path: Path) -> None:
    run = fake_run.make_run(
        tmp_path, count=450, methods=("todre", "divprune", "fastv", "mustdrop"), budgets=(64,),
        controls=(),
    )  # fmt: skip
    ranked = sorted(
        (r for r in analyse(load_run(run), draws=20).results if r.point.method),
        key=lambda r: -r.accuracy,
    )
    first, second, *_, last = (r.point.trials[0] for r in ranked)
    won = _judged(run, first, last)
    assert won.beats
    assert won.interval[0] > 0
    lost = _judged(run, last, first)
    assert not lost.beats
    assert lost.gap < 0
    both = _judged(run, first, last, second)
    assert both.rival.point.trials[0] == second
    assert both.p >= max(won.p, _judged(run, first, second).p)
    itself = _judged(run, first, first, last)
    assert itself.gap is None
    assert not itself.beats


# ------------------------------------------------------------------------------ compositions

TOGETHER = tokprune.compose(
    tokprune.VisionZip(keep=18), tokprune.DivPrune(keep=12), tokprune.FastV(keep=5, prune_before=1)
)


def test_a_composition_is_a_setting(home: Path, tmp_path: Path) -> None:
    setting = setting_of(TOGETHER)
    assert setting["method"] == "compose"
    assert [part["method"] for part in setting["options"]["methods"]] == [
        "visionzip", "divprune", "fastv",
    ]  # fmt: skip
    save_setting({**setting, "repr": repr(TOGETHER)}, tmp_path / "s.json")
    assert load_setting(tmp_path / "s.json") == TOGETHER == load_setting(setting)
    model = tokprune.load(home / "model", setting=tmp_path / "s.json")
    trace = tokprune.trace_of(model)
    assert trace is not None
    assert "VisionZip" in trace.method
    assert "FastV" in trace.method
    lifted = tokprune.compose(
        tokprune.VisionZip(keep=18, rectify="size"),
        tokprune.FastV(keep=5),  # type: ignore[arg-type]
    )
    again = load_setting(json.loads(json.dumps(setting_of(lifted))))
    assert again == lifted
    assert again.rectify == lifted.rectify is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "methods=None of compose should be a list"),
        ({"methods": "fastv"}, "methods='fastv' of compose should be a list"),
        ({"methods": [{"method": "fastv", "options": {"keep": 5}}]}, "at least two methods, got 1"),
        ({"methods": [3, 4]}, r"methods\[0\] of compose: method=3"),
        ({"methods": [{"name": "fastv"}, {}]}, r"methods\[0\] of compose=.* should be a table"),
        ({"methods": [{"method": "fastv", "options": {"kep": 5}}]}, r"methods\[0\].*mean 'keep'"),
        ({"methods": [], "keep": 3}, "option 'keep' is unknown to compose; it has: methods"),
    ],
)
def test_bad_compositions(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, CompositionError), match=message):
        load_setting({"schema": 2, "method": "compose", "options": options})


def test_a_sweep_answers_a_composition_as_it_is(home: Path, tmp_path: Path) -> None:
    spec = {"name": "compose", **setting_of(TOGETHER)["options"]}
    bench = home / "bench" / "small.jsonl"
    with pytest.raises(ValueError, match="should have as_published=true beside its methods"):
        case.settings(home / "model", bench, tmp_path, methods=(spec,))
    given = case.settings(
        home / "model", bench, tmp_path / "run", limit=6, methods=({**spec, "as_published": True},)
    )
    run = run_sweep(given)
    trial = next(t for t in run.trials.values() if t["method"] == "compose")
    assert trial["repr"] == repr(TOGETHER)
    assert run.gates()[trial["trial"]].outcome != "fail"
    assert run_sweep(given).trials == run.trials  # read back and gone on with
    found = load_setting({"schema": 2, "method": "compose", "options": trial["options"]})
    assert found == TOGETHER


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ()}, "tokens or latency is missing"),
        ({"tokens": ("x",)}, "keep='x' should be a count"),
        ({"tokens": (99,)}, "keep=99 is more than the 36 visual tokens"),
        ({"latency": (0.0,)}, "latency=0.0 should be a number of seconds"),
        ({"trials": 0}, "trials=0 should be a whole number"),
        ({"methods": ("fastvv",)}, "'fastvv' is unknown.*mean 'fastv'"),
        ({"held_out": "test"}, "held_out='test' is the split to choose by"),
        ({"split": "train"}, "split='train' is unknown"),
        ({"held_out": 1.5}, "held_out=1.5 should be a share"),
    ],
)
def test_refusals(home: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("held_out") == "test":
        changes = {**changes, "split": "test"}
    with pytest.raises(ValueError, match=message):
        run_tune(settings(home, tmp_path / "run", **changes))


def test_splits_of_mini_are_apart() -> None:
    found = Questions.of(TuneSettings("mini", "x", (64,), limit=50, held_out_limit=70))
    first = {item.image_id for item in found.choosing.items}
    assert found.choosing.split == "validation"
    assert found.held_out.split == "test"
    assert (len(found.choosing.items), len(found.held_out.items)) == (50, 70)
    assert not first & {item.image_id for item in found.held_out.items}
    assert {item.task for item in found.held_out.items} == set(found.held_out.benchmark.headline)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give at least one budget: --tokens 64 or --latency 120ms"),
        (["--tokens", "x"], "--tokens 'x' should be a count"),
        (["--latency", "5"], "--latency '5' should be a time with its unit"),
        (["--latency", "5ms", "--no-latency"], "--no-latency leaves no time"),
        (["--tokens", "9", "--held-out", "3.5"], "--held-out"),
        (["--tokens", "9", "--methods", "nope"], "method 'nope' is unknown"),
        (["--tokens", "9", "--split", "test", "--held-out", "test"], "is the split to choose by"),
    ],
)
def test_cli_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = call(capsys, "--model", "mini", "--out", tmp_path / "run", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert message in err


def test_cli_without_optuna(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokprune.eval import extra

    found = extra.find_spec
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == "optuna" else found(name))
    code, _, err = call(capsys, "--model", "mini", "--tokens", 9, "--out", tmp_path / "run")
    assert code == 2
    assert err == (
        "Error: tuned settings need optuna, which is not installed: pip install 'tokprune[tune]'\n"
    )


def test_cli(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(
        capsys, "--model", home / "model", "--benchmark", home / "bench" / "small.jsonl",
        "--tokens", "9", "--trials", 2, "--methods", "random,grid", "--device", "cpu",
        "--held-out", "1/4", "--rivals", 1, "--no-latency", "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0
    assert "9 of 36 tokens" in out
    assert "best published setting" in out
    assert (tmp_path / "run" / "settings" / "tokens-9.json").is_file()
    assert len({row["image"] for row in read_run(tmp_path / "run" / "held-out").rows}) == 4


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[Any, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        app(["tune", *map(str, arguments)])
    out, err = capsys.readouterr()
    return caught.value.code, out, err
