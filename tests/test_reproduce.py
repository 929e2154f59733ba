"""``tokprune reproduce`` as installed: which rows, what is run, and how far ours is off."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published_case as case
import pytest

from tokprune.cli import app
from tokprune.eval.published import load_paper, read_paper
from tokprune.eval.published.reproduce import compare, execute, read_figures, select
from tokprune.eval.published.reproduce.execution import plan
from tokprune.eval.published.reproduce.show import note
from tokprune.eval.report.statistics import wilson
from tokprune.eval.sweep import read_run
from tokprune.eval.sweep.variants import build_variants, parse_variant

COMMAND = str(Path(sys.executable).with_name("tokprune"))


def call(*parts: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [COMMAND, "reproduce", *map(str, parts)], capture_output=True, text=True, env=environment,
        timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reproduce")
    case.make_ledger(root / "ledger")
    case.make_questions(root / "questions")
    return root


@pytest.fixture(scope="module")
def executed(home: Path) -> dict[str, Any]:
    """The rows of the toy paper, run with the embedded model."""
    done = call(
        "--ledger", home / "ledger", "--paper", "toy", "--model", "mini", "--as", "llava-1.5-7b",
        "--execute", "--benchmark", home / "questions" / "questions.jsonl", "--device", "cpu",
        "--out", home / "out", "--format", "json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def _of(told: dict[str, Any], label: str, benchmark: str, unit: str = "%") -> dict[str, Any]:
    found = [
        c for c in told["comparisons"]
        if (c["published"]["label"], c["published"]["benchmark"], c["published"]["unit"])
        == (label, benchmark, unit)
    ]  # fmt: skip
    assert len(found) == 1, (label, benchmark)
    comparison: dict[str, Any] = found[0]
    return comparison


def _answers(home: Path, variant: str, task: str) -> list[float]:
    """Scores of a trial, from whichever run folder has it."""
    for folder in sorted((home / "out").glob("run-*")):
        run = read_run(folder)
        scores = [r["score"] for r in run.rows if (r["trial"], r["task"]) == (variant, task)]
        if scores:
            return scores
    raise AssertionError(f"no run has {variant} on {task}")


# ------------------------------------------------------------------------------ running


def test_rows_are_run_at_exactly_the_published_options(
    home: Path, executed: dict[str, Any]
) -> None:
    trials = {c["trial"]: c for folder in (home / "out").glob("run-*")
             for c in read_run(folder).info["trials"]}  # fmt: skip
    fastv = trials["fastv+as_published=true+keep=166+prune_before=2"]
    assert fastv["options"] == {
        "keep": 166, "prune_before": 2, "rows": "last", "positions": None,
    }  # fmt: skip
    # two of six layers see all 576 tokens, which matching to 192 on average would have changed
    assert fastv["budget"] == pytest.approx((2 * 576 + 4 * 166) / 6)
    assert fastv["budget_text"] == "as_published"
    zipped = trials["visionzip+as_published=true+contextual=10+dominant=54"]
    assert (zipped["options"]["dominant"], zipped["options"]["contextual"]) == (54, 10)
    assert zipped["calibrated"]["tokens_last"] == 64
    assert trials["none"]["control"]


def test_ours_gap_and_tolerance_are_those_of_the_answers(
    home: Path, executed: dict[str, Any]
) -> None:
    for label, variant, task, benchmark in (
        ("LLaVA", "none", "gqa", "gqa"),
        ("VisionZip", "visionzip+as_published=true+contextual=10+dominant=54", "POPE", "pope"),
        ("FastV", "fastv+as_published=true+keep=166+prune_before=2", "gqa", "gqa"),
    ):
        scores = _answers(home, variant, task)
        told = _of(executed, label, benchmark)
        mean, n = sum(scores) / len(scores), len(scores)
        published = told["published"]["value"]
        assert n == 5
        assert told["status"] == "run"
        assert told["reason"] is None
        assert told["ours"]["value"] == pytest.approx(100 * mean)
        assert told["ours"]["n"] == n
        assert told["ours"]["interval"] == pytest.approx([100 * x for x in wilson(mean * n, n)])
        assert told["gap"] == pytest.approx(100 * mean - published)
        share = published / 100
        assert told["tolerance"] == pytest.approx(200 * math.sqrt(share * (1 - share) / n))
        assert told["within"] == (abs(told["gap"]) <= told["tolerance"])
        assert any("questions" in note for note in told["ours"]["notes"])
    assert _of(executed, "FastV", "gqa")["within"] is False  # printed as 1 %


def test_retention_is_of_the_unpruned_figures_of_each_side(
    home: Path, executed: dict[str, Any]
) -> None:
    told = _of(executed, "VisionZip", "pope")
    variant = "visionzip+as_published=true+contextual=10+dominant=54"
    mine, base = _answers(home, variant, "POPE"), _answers(home, "none", "POPE")
    assert told["retained"]["published"] == pytest.approx(77.0 / 85.9)
    assert told["retained"]["ours"] == pytest.approx(sum(mine) / sum(base))


@pytest.mark.parametrize(
    ("label", "benchmark", "unit", "reason"),
    [
        ("Elsewhere", "gqa", "%", "method not in this version"),
        ("ToDRE", "gqa", "%", "exact setting not known"),
        ("TransPrune", "gqa", "%", "not possible on this model: prune_before=(7, 9, 12) should"),
        ("VisionZip", "mme", "score", "not comparable: mme_perception_score cannot be had"),
        ("VisionZip", "textvqa", "%", "no data: no task textvqa"),
        ("VisionZip", "vqav2", "%", "no data: no task vqav2 (test-dev)"),
        ("VisionZip", "average", "% of unpruned", "an average of several benchmarks"),
        ("VisionZip", "pope", "ms", "a cost, not an answer"),
    ],
)
def test_rows_not_run_say_why(
    executed: dict[str, Any], label: str, benchmark: str, unit: str, reason: str
) -> None:
    told = _of(executed, label, benchmark, unit)
    assert told["status"] == "not run"
    assert told["ours"] is None
    assert told["gap"] is None
    assert told["within"] is None
    assert told["reason"].startswith(reason)


def test_rows_of_other_models_are_not_listed(executed: dict[str, Any]) -> None:
    models = {c["published"]["model"] for c in executed["comparisons"]}
    assert models == {"llava-1.5-7b"}
    assert executed["rows"] == len(executed["comparisons"]) == 13
    assert executed["run"] == 5
    assert executed["within"] + executed["outside"] == 5


def test_files_are_written_beside_the_runs(home: Path, executed: dict[str, Any]) -> None:
    assert json.loads((home / "out" / "reproduce.json").read_text()) == executed
    page = (home / "out" / "reproduce.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| toy |")]
    assert len(lines) == 13
    assert sum("| not run |" in line for line in lines) == 8
    assert "**toy, Table 1**: A Toy (arXiv 2501.00001)" in page
    assert "Made up." in page
    assert "| FastV ° |" in page


def test_finished_runs_are_read_without_running_anything(
    home: Path, executed: dict[str, Any]
) -> None:
    folders = [part for folder in sorted((home / "out").glob("run-*"))
               for part in ("--run", folder)]  # fmt: skip
    done = call("--ledger", home / "ledger", "--as", "llava-1.5-7b", *folders, "--format", "json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["run"] == executed["run"]
    for label, benchmark in (("LLaVA", "gqa"), ("VisionZip", "pope"), ("FastV", "gqa")):
        mine, before = (_of(t, label, benchmark)["ours"] for t in (told, executed))
        # the unpruned model is in several runs; the first has it
        assert {**mine, "run": ""} == {**before, "run": ""}
    # without --execute there was no attempt, so the run itself says what it lacks
    assert _of(told, "VisionZip", "textvqa")["reason"] == "the run has no task textvqa"


def test_an_unfinished_job_is_resumed(home: Path, executed: dict[str, Any]) -> None:
    before = {p: p.read_bytes() for p in (home / "out").glob("run-*/rows.jsonl")}
    done = call(
        "--ledger", home / "ledger", "--paper", "toy", "--model", "mini", "--as", "llava-1.5-7b",
        "--execute", "--benchmark", home / "questions" / "questions.jsonl", "--device", "cpu",
        "--out", home / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "answers are there already" in done.stderr
    assert {p: p.read_bytes() for p in before} == before
    assert "13 published figures, 5 of them run here" in done.stdout
    assert "method not in this version" in done.stdout


def test_weights_that_are_not_there_leave_every_row_not_run(home: Path, tmp_path: Path) -> None:
    done = call(
        "--ledger", home / "ledger", "--paper", "toy", "--model", tmp_path / "llava-1.5-7b-hf",
        "--execute", "--benchmark", home / "questions" / "questions.jsonl", "--out",
        tmp_path / "out", "--format", "json",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert told["run"] == 0
    reason = _of(told, "VisionZip", "pope")["reason"]
    assert reason == f"not run: model {tmp_path / 'llava-1.5-7b-hf'}: no such folder"


def test_metrics_of_a_harness_go_before_means(home: Path, executed: dict[str, Any]) -> None:
    """MME's score cannot be had from single questions; the harness's own figure can."""
    folder = next(f for f in sorted((home / "out").glob("run-*"))
                  if {"gqa", "POPE"} <= {r["task"] for r in read_run(f).rows})  # fmt: skip
    figures = read_figures(folder, "llava-1.5-7b")
    variant = "visionzip+as_published=true+contextual=10+dominant=54"
    figures.tasks["mme"] = [("mme", None)]
    figures._rows[variant, "mme"] = figures._rows[variant, "gqa"]
    figures.metrics = {variant: {"mme": {"mme_perception_score,none": 1512.5},
                             "gqa": {"exact_match,none": 0.625}}}  # fmt: skip
    rows = select(["toy"], model="llava-1.5-7b", tasks=["mme", "gqa"], methods=["visionzip"],
                  ledger=home / "ledger")  # fmt: skip
    compared = {c.row.benchmark: c for c in compare(rows, [figures]) if c.row.method != "none"}
    mme, gqa = compared["mme"], compared["gqa"]
    assert mme.ours is not None
    assert gqa.ours is not None
    assert (mme.ours.value, mme.ours.interval) == (1512.5, None)
    assert (mme.gap, mme.tolerance, mme.within) == (1512.5 - 1690, 20, False)
    assert gqa.ours.value == 62.5


def test_what_is_not_measured_as_ours_is_said(home: Path, executed: dict[str, Any]) -> None:
    folder = next(f for f in sorted((home / "out").glob("run-*"))
                  if {"gqa", "POPE"} <= {r["task"] for r in read_run(f).rows})  # fmt: skip
    content = json.loads((home / "ledger" / "toy.json").read_text(encoding="utf-8"))
    content["dialect"] = {"paper": {"harness": ["lmms-eval", "r"], "vizwiz_split": ["val", "r"],
                                    "pope": ["F1, mean of three", "i"]}}  # fmt: skip
    rows = [r for r in read_paper(content, "toy.json")
            if r.method == "none" and r.benchmark in ("gqa", "pope")]  # fmt: skip
    figures = read_figures(folder, "llava-1.5-7b")
    compared = compare(rows, [figures])
    assert [c.differs for c in compared] == [("harness",), ("harness",)]
    assert "not measured alike: harness (lmms-eval, here tokprune)" in note(compared[0])
    assert compared[0].to_dict()["differs"] == ["harness"]
    # as if lmms-eval had asked
    figures.run.info["harness"] = {"name": "lmms-eval", "version": "0.3.4"}
    assert [c.differs for c in compare(rows, [figures])] == [(), ("pope",)]


def test_methods_of_the_same_tasks_share_a_sweep(home: Path, tmp_path: Path) -> None:
    rows = select(["toy"], model="llava-1.5-7b", ledger=home / "ledger")
    questions = str(home / "questions" / "questions.jsonl")
    jobs, reasons = plan(rows, "mini", tmp_path, benchmark=questions)
    swept = {tuple(s.tasks or ()): [m["name"] for m in s.methods] for s, _ in jobs}
    assert swept == {("gqa",): ["fastv", "transprune"], ("POPE", "gqa"): ["visionzip"]}
    assert len({s.out for s, _ in jobs}) == 2
    assert len(reasons) == 3
    for settings, own in jobs:
        assert not settings.controls
        assert settings.compared()[0].name == "none"
        assert all(variant.as_published for variant in settings.compared()[1:])
        assert {row.method for row in own} >= {m["name"] for m in settings.methods}


def test_a_method_that_lacks_one_task_joins_the_others(home: Path, tmp_path: Path) -> None:
    """Asking it one task more costs less than asking the unpruned model again."""
    rows = select(["toy"], model="llava-1.5-7b", methods=["visionzip", "fastv"],
                  ledger=home / "ledger")  # fmt: skip
    questions = str(home / "questions" / "questions.jsonl")
    ((settings, own),), _ = plan(rows, "mini", tmp_path, benchmark=questions)
    assert settings.tasks == ("POPE", "gqa")
    assert [m["name"] for m in settings.methods] == ["visionzip", "fastv"]
    assert [row.label for row in own].count("LLaVA") == 2


def test_unpruned_rows_alone_are_run(home: Path, tmp_path: Path) -> None:
    rows = select(["toy"], methods=["none"], tasks=["pope"], ledger=home / "ledger")
    jobs, _ = plan(rows, "mini", tmp_path, benchmark=str(home / "questions" / "questions.jsonl"))
    assert [(s.methods, s.tasks) for s, _ in jobs] == [(("none",), ("POPE",))]


def test_a_job_that_fails_leaves_the_others(home: Path, tmp_path: Path) -> None:
    rows = select(["toy"], model="llava-1.5-7b", ledger=home / "ledger")
    seen = []

    def runner(settings: Any) -> None:
        seen.append(settings.tasks)
        if settings.tasks == ("gqa",):
            raise RuntimeError("out of\nmemory")
        Path(settings.out).mkdir(parents=True)

    folders, reasons = execute(
        rows, "mini", tmp_path, runner, benchmark=str(home / "questions" / "questions.jsonl")
    )
    assert len(seen) == 2
    assert len(folders) == 1
    failed = [row.label for row in rows if reasons.get(row.key) == "not run: out of memory"]
    assert failed == ["LLaVA", "FastV", "TransPrune"]


def test_lmms_eval_takes_its_own_tasks_and_leaves_servers_alone(home: Path, tmp_path: Path) -> None:
    rows = select(["toy"], model="llava-1.5-7b", ledger=home / "ledger")
    jobs, reasons = plan(
        rows, "llava-hf/llava-1.5-7b-hf", tmp_path, harness="lmms-eval", limit=9, processes=2
    )
    assert {(s.harness, s.limit, s.processes) for s, _ in jobs} == {("lmms-eval", 9, 2)}
    swept = {tuple(s.tasks or ()): [m["name"] for m in s.methods] for s, _ in jobs}
    assert swept == {
        ("gqa",): ["fastv", "transprune"],
        ("gqa", "mme", "pope", "textvqa_val"): ["visionzip"],
    }
    server = next(row for row in rows if row.benchmark == "vqav2")
    assert reasons == {server.key: "not run: answers are judged by a submission server"}


# ------------------------------------------------------------------------------ choosing


def test_shipped_ledger_lists_the_rows_of_a_paper() -> None:
    done = call("--paper", "todre", "--model", "llava-hf/llava-v1.6-vicuna-7b-hf", "--tasks",
                "gqa,MMB", "--methods", "todre", "--keep", "10%", "--format", "json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    found = [(c["published"]["label"], c["published"]["value"]) for c in told["comparisons"]]
    assert found == [("LLaVA-NeXT-7B", 64.2), ("LLaVA-NeXT-7B", 68.5), ("ToDRE", 59.4),
                     ("ToDRE", 63.3)]  # fmt: skip
    assert {c["reason"] for c in told["comparisons"]} == {"not run: give --run, or --execute"}
    assert _of(told, "ToDRE", "gqa")["retained"]["published"] == pytest.approx(59.4 / 64.2)


def test_without_options_the_papers_are_listed(home: Path) -> None:
    done = call("--format", "json")
    assert done.returncode == 0, done.stderr
    told = {entry["paper"]: entry for entry in json.loads(done.stdout)}
    assert told["todre"]["rows"] == len(load_paper("todre"))
    assert "todre" in told["todre"]["methods"]
    own = call("--ledger", home / "ledger")
    assert "A Toy, arXiv 2501.00001" in own.stdout
    assert "| toy | 14 |" in call("--ledger", home / "ledger", "--format", "markdown").stdout


def test_table_and_markdown_show_the_same_rows(home: Path) -> None:
    base = ("--ledger", home / "ledger", "--paper", "toy", "--tasks", "gqa", "--methods", "fastv")
    table, markdown = call(*base).stdout, call(*base, "--format", "markdown").stdout
    for text in (table, markdown):
        assert "FastV °" in text
        assert "not run" in text
        assert "2 published figures, 0 of them run here" in text


@pytest.mark.parametrize(
    ("keep", "labels"), [("192", ["LLaVA", "FastV"]), ("64", ["LLaVA", "VisionZip"])]
)
def test_budgets_as_printed(home: Path, keep: str, labels: list[str]) -> None:
    rows = select(["toy"], tasks=["gqa"], keep=[keep], methods=["fastv", "visionzip"],
                  model="llava-1.5-7b", ledger=home / "ledger")  # fmt: skip
    assert [row.label for row in rows] == labels


# ------------------------------------------------------------------------------ refused


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused; gives its one error line."""

    def refuse(*parts: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            app(["reproduce", *map(str, parts)])
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (2, ""), err
        assert err.startswith("Error: ")
        return err.strip()

    return refuse


def test_bad_input_is_one_line(home: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    toy = ("--ledger", home / "ledger")
    questions = home / "questions" / "questions.jsonl"
    run = (*toy, "--paper", "toy", "--model", "mini", "--as", "llava-1.5-7b", "--execute")
    assert "paper 'todrex' is not in the ledger" in refused("--paper", "todrex")
    assert "no row is of model 'mini'" in refused(*toy, "--model", "mini")
    assert "--as says which published model" in refused(*toy, "--model", "mini")
    assert "task 'colour' is unknown to the ledger" in refused(*toy, "--tasks", "colour")
    assert "no row is of task seedbench; there are" in refused(*toy, "--tasks", "seedbench")
    assert "no row is of method 'tome'" in refused(*toy, "--methods", "tome")
    assert "no row is at keep 7; there are" in refused(*toy, "--keep", "7")
    assert "--execute needs --model" in refused(*toy, "--paper", "toy", "--execute")
    assert "--execute needs --out" in refused(*run)
    assert "benchmark is missing" in refused(*run, "--out", tmp_path / "o")
    assert "none of its tasks is named" in refused(
        *run, "--out", tmp_path / "o", "--benchmark", "mini"
    )
    assert "no such file" in refused(*run, "--out", tmp_path / "o", "--benchmark", "no.jsonl")
    assert "--benchmark is for --execute" in refused(*toy, "--tasks", "gqa", "--benchmark",
                                                     questions)  # fmt: skip
    assert "no such folder" in refused(*toy, "--run", tmp_path / "nothing")
    (tmp_path / "more.yaml").write_text("keep: [64]\n")
    (tmp_path / "less.yaml").write_text("dytpe: float32\n")
    ready = (*run, "--out", tmp_path / "o", "--benchmark", questions)
    assert "setting 'keep' follows from the published rows" in refused(
        *ready, "--config", tmp_path / "more.yaml"
    )
    assert "setting 'dytpe' is unknown. Did you mean 'dtype'?" in refused(
        *ready, "--config", tmp_path / "less.yaml"
    )
    assert "is for harness 'builtin'" in refused(*ready, "--harness", "lmms-eval")
    assert "--config is for --execute" in refused(*toy, "--tasks", "gqa", "--config",
                                                  tmp_path / "more.yaml")  # fmt: skip
    assert "--ledger" in refused("--ledger", tmp_path / "nothing")
    assert "should be values separated by commas" in refused(*toy, "--tasks", "gqa,,pope")
    assert not (tmp_path / "o").exists()


def test_metrics_file_of_another_form_is_refused(home: Path, executed: Any, tmp_path: Path) -> None:
    source = next((home / "out").glob("run-*"))
    for name in ("run.json", "rows.jsonl"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "metrics.json").write_text('{"none": {"gqa": 3}}')
    with pytest.raises(ValueError, match=r"metrics\.json: should be an object"):
        read_figures(tmp_path)


def test_exact_variants_take_options_as_they_are() -> None:
    name, options = parse_variant("visionzip:dominant=54:contextual=10:as_published=True")
    variant = build_variants([(name, options)], False, False)[1]
    assert variant.as_published
    assert not variant.stochastic
    assert variant.name == "visionzip+as_published=true+contextual=10+dominant=54"
    made = variant.published_method()
    assert (made.dominant, made.contextual) == (54, 10)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="'as_published' of fastv should be true, is 1"):
        parse_variant({"name": "fastv", "keep": 3, "as_published": 1})
    with pytest.raises(ValueError, match="option 'kept' is unknown to fastv"):
        parse_variant({"name": "fastv", "kept": 3, "as_published": True})
    with pytest.raises(ValueError, match="'keep' is required by fastv"):
        parse_variant({"name": "fastv", "as_published": True})
    with pytest.raises(ValueError, match="keep='many' should be a number"):
        parse_variant({"name": "fastv", "keep": "many", "as_published": True})
