"""Sweeps through lmms-eval itself: killed, resumed, reported, and equal to our own harness."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness_case as case
import pytest

from tokprune.eval.report import build_report
from tokprune.eval.report.groups import read_groups
from tokprune.eval.sweep import read_run, run_sweep
from tokprune.integrations.lmms_eval import driver
from tokprune.integrations.lmms_eval.tasks import scores

VICTIM = """
import pathlib, sys
import harness_case as case
from tokprune.eval.sweep import run_sweep
run_sweep(case.settings(pathlib.Path(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("harness")


@pytest.fixture(scope="module")
def killed(home: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A sweep that was killed outright in its second trial; the rows it had, after its child was
    seen to end as well."""
    out = home / "run"
    # a process of its own: what this one has open (locks of other tests) cannot be inherited
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, str(out)], cwd=Path(__file__).parent)
    second = out / "lmms" / f"divprune@{case.BUDGETS[0]}" / "log.txt"
    until = time.monotonic() + 300
    while not (second.exists() and second.stat().st_size):
        assert victim.poll() is None, "the sweep ended too early"
        assert time.monotonic() < until, "the sweep hangs"
        time.sleep(0.05)
    children = _children(victim.pid)
    assert children
    victim.kill()
    victim.wait()
    while any(_alive(child) for child in children):
        assert time.monotonic() < until, "the child outlives the sweep"
        time.sleep(0.05)
    return out, read_run(out).rows


def _children(parent: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture(scope="module")
def run(killed: Any) -> Any:
    """The same sweep, gone on with, and then with a control added."""
    out, _ = killed
    run_sweep(case.settings(out))
    return run_sweep(case.settings(out, methods=("downsample",), keep=(64,)))


@pytest.fixture(scope="module")
def own(home: Path) -> Any:
    """The same questions asked by our own harness."""
    out = home / "own"
    run_sweep(case.own_settings(out))
    return run_sweep(case.own_settings(out, methods=("downsample",), keep=(64,)))


def test_a_killed_sweep_goes_on_where_it_was(killed: Any, run: Any) -> None:
    _, before = killed
    assert {row["trial"] for row in before} == {"none"}
    assert run.rows[: len(before)] == before
    assert run.info["finished"]
    trials = [f"{m}@{b}" for m in case.METHODS for b in case.BUDGETS]
    assert sorted(run.trials) == sorted(["none", "downsample@64", *trials])
    assert len(run.rows) == len(run.trials) * case.EACH * len(case.KINDS)
    assert (run.stale, run.duplicates) == (0, 0)
    assert {row["status"] for row in run.rows} == {"ok"}
    assert set(run.metrics()) == set(run.trials)


def test_rows_are_those_of_our_own_harness(run: Any, own: Any) -> None:
    ours, theirs = case.numbers(own), case.numbers(run, case.own_names())
    assert theirs.keys() == ours.keys()
    for key, wanted in ours.items():
        assert theirs[key] == wanted, key
    # something was pruned, and it mattered
    assert {row["tokens_mean"] for row in run.rows_of("visionzip@64")} == {64.0}
    assert any(row["score"] == 0 for row in run.rows)
    assert any(row["score"] == 1 for row in run.rows)
    for trial in run.trials:
        for task in case.TASKS:
            own_scores = [r["score"] for r in run.rows_of(trial) if r["task"] == task]
            mean = sum(own_scores) / len(own_scores)
            assert run.metrics()[trial][task]["accuracy"] == pytest.approx(mean)


def test_the_report_has_the_groups_of_our_own(run: Any, own: Any, tmp_path: Path) -> None:
    names = case.own_names()
    report = build_report(run.folder, tmp_path / "report", draws=200)
    theirs = build_report(own.folder, tmp_path / "own", draws=200)
    (here,) = read_groups(tmp_path / "report")
    (there,) = read_groups(tmp_path / "own")
    assert {names[item] for item in here.hard} == set(there.hard)
    assert {names[item] for item in here.easy} == set(there.easy)
    assert here.hard
    for result in report.analysis.results:
        (same,) = (r for r in theirs.analysis.results if r.point.name == result.point.name)
        for kind, task in zip(case.KINDS, case.TASKS):
            found, wanted = result.tasks[task], same.tasks[kind]
            assert (found.n, found.accuracy) == (wanted.n, wanted.accuracy)
            assert found.flips == wanted.flips
    again = build_report(run.folder, tmp_path / "again", groups_from=tmp_path / "report", draws=200)
    assert [table.groups for table in again.groups] == [here]
    assert run.latency is not None
    timed = run.latency["trials"]["none"]
    assert 0 < timed["prefill"]["median"] <= timed["total"]["median"]
    assert "a process of its own" in report.html.read_text()


def test_two_processes_give_the_rows_of_one(run: Any, tmp_path: Path) -> None:
    """One trial is asked again, by two processes with unequal shares."""
    out = tmp_path / "two"
    shutil.copytree(run.folder, out)
    trial = f"visionzip@{case.BUDGETS[0]}"
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(x for x in lines if json.loads(x)["trial"] != trial))
    shutil.rmtree(out / "lmms")
    assert len(read_run(out).rows) < len(run.rows)
    two = run_sweep(case.settings(out, processes=2))
    assert [path.name for path in (out / "lmms").iterdir()] == [trial]
    log = (out / "lmms" / trial / "log.txt").read_text()
    assert "Rank 1: loading datasets" in log
    assert (two.stale, two.duplicates) == (0, 0)
    assert len(two.rows) == len(run.rows)
    assert case.numbers(two) == case.numbers(run)


def test_bad_names_are_refused_before_anything_runs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for changes, message in [
        ({"tasks": ("tokprune_mini_colour",)}, "Did you mean 'tokprune_mini_color'"),
        ({"base": "llava_hff"}, "Did you mean 'llava_hf'"),
        ({"model_args": {"attn_implementatio": "eager"}}, "Did you mean 'attn_implementation'"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_sweep(case.settings(out, **changes))
        assert not out.exists()


def test_groups_are_opened_and_called_by_name() -> None:
    loaded = driver.load_tasks(["tokprune_mini", "tokprune_mini_count"], [])
    assert loaded.called == ("tokprune_mini", "tokprune_mini_count")
    assert len(loaded.groups["tokprune_mini"]) == 10
    assert len(loaded.tasks) == 11
    again = driver.load_tasks(["tokprune_mini_c*"], [])
    assert set(again.tasks) == {"tokprune_mini_color", "tokprune_mini_count"}
    assert again.versions["tokprune_mini_color"] == loaded.versions["tokprune_mini_color"]


def test_base_arguments_are_known() -> None:
    base = driver.check_base("llava_hf", case.settings(Path("x")))
    assert base.takes("dtype")
    assert base.takes("device_map")
    assert not base.takes("nonsense")


# ---------------------------------------------------------- scores on what tasks really log

MMMU = {"id": "validation_Math_1", "options": "['1', '2', '3']", "question": "?"}


def _logs(task: str, doc: dict[str, Any], answer: str) -> dict[str, Any]:
    """What the task's own code logs for an answer."""
    import importlib

    module, name = {
        "pope": ("pope.utils", "pope_process_results"),
        "mme": ("mme.utils", "mme_process_results"),
        "mmstar": ("mmstar.utils", "mmstar_process_results"),
        "ocrbench": ("ocrbench.utils", "ocrbench_process_results"),
        "chartqa": ("chartqa.utils", "chartqa_process_results"),
        "textvqa_val": ("textvqa.utils", "textvqa_process_results"),
        "vqav2_val": ("vqav2.utils", "vqav2_process_results_val"),
        "vizwiz_vqa_val": ("vizwiz_vqa.utils", "vizwiz_vqa_process_results"),
        "scienceqa": ("scienceqa.utils", "sqa_process_results"),
        "seedbench": ("seedbench.utils", "seed_process_result"),
        "mmbench_en_dev": ("mmbench.en_utils", "mmbench_process_results"),
        "mmmu_val": ("mmmu.utils", "mmmu_process_results"),
    }[task]
    process = getattr(importlib.import_module(f"lmms_eval.tasks.{module}"), name)
    # a sample goes through JSON before it is read
    return dict(json.loads(json.dumps(process(doc, [answer]))))


def _mmbench(answer: str) -> dict[str, Any]:
    fields = ("question", "hint", "source", "split", "category", "L2-category")
    options = {"A": "a cat", "B": "a dog", "C": "nan", "D": "nan"}
    return {"index": 1, "answer": answer, **dict.fromkeys(fields, "x"), **options}


def _ten(answer: str, times: int) -> list[str]:
    return [answer] * times + ["other"] * (10 - times)


@pytest.mark.parametrize(
    ("task", "doc", "right", "wrong"),
    [
        ("pope", {"question_id": 1, "answer": "yes"}, "Yes", "no"),
        ("mme", {"question_id": "a.png", "answer": "No", "category": "color"}, "No", "Yes"),
        ("mme", {"question_id": "a.png", "answer": "Yes", "category": "code_reasoning"}, "Yes.",
         "maybe"),
        ("mmstar", {"index": 1, "answer": "A", "category": "math", "l2_category": "x"}, "A", "B"),
        ("ocrbench", {"answer": ["shop"], "dataset": "x", "question_type": "y"}, "The SHOP", "sho"),
        ("chartqa", {"type": "human_test", "answer": "100"}, "104", "106"),
        ("scienceqa", {"answer": 1, "choices": ["x", "y"]}, "B", "A. x"),
        ("seedbench", {"answer": "C", "data_type": "Scene", "question_id": 1}, "C. sea", "D"),
        ("mmbench_en_dev", _mmbench("B"), "B. a dog", "A"),
        ("mmmu_val", {**MMMU, "question_type": "multiple-choice", "answer": "B"}, "B", "C"),
        ("mmmu_val", {**MMMU, "question_type": "open", "answer": "12.5"}, "It is 12.50.", "13"),
        ("mmmu_val", {**MMMU, "question_type": "open", "answer": "['red', 'blue']"},
         "The answer is Blue.", "green"),
    ],
)  # fmt: skip
def test_scores_of_what_the_tasks_log(
    task: str, doc: dict[str, Any], right: str, wrong: str
) -> None:
    given = [scores.score(task, _logs(task, dict(doc), answer)) for answer in (right, wrong)]
    assert given == [1.0, 0.0]


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        ("textvqa_val", lambda: _ten("house", 2)),
        ("vizwiz_vqa_val", lambda: _ten("house", 2)),
        ("vqav2_val", lambda: [
            {"answer": a, "answer_id": n} for n, a in enumerate(_ten("house", 2))
        ]),
    ],
)  # fmt: skip
def test_soft_accuracies_stay_soft(task: str, answers: Any) -> None:
    doc = {"question_id": 1, "answers": answers()}
    # two of ten said so: each of these two has one other, the eight have two, in thirds
    wanted = (2 * 1 / 3 + 8 * 2 / 3) / 10
    assert scores.score(task, _logs(task, doc, "house")) == pytest.approx(wanted)


def test_open_answers_of_mmmu_are_judged_as_there() -> None:
    from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response

    answers = ["7", "x is 7.", "a b", "the red house", "1,000", "so 1000.004", "", "A"]
    for right in ("7", "red", "b", "1000", "A"):
        for answer in answers:
            parsed = parse_open_response(answer)
            sample = {"mmmu_acc": {
                "question_type": "open", "answer": right, "parsed_pred": [parsed]
            }}  # fmt: skip
            assert scores.score("mmmu_val", sample) == float(eval_open(right, parsed))
