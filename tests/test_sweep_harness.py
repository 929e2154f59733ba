"""Sweeps through lmms-eval as far as they need none: settings, commands, rows from samples, scores,
and the book-keeping of a run whose questions a process of its own answers (here a stand-in)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_lmms
import pytest
import sweep_case as case

from tokprune.cli import app
from tokprune.eval.benchmarks.base import Item
from tokprune.eval.benchmarks.files import FileBenchmark
from tokprune.eval.report import build_report
from tokprune.eval.report.groups import read_groups
from tokprune.eval.sweep import Settings, read_run, run_sweep
from tokprune.eval.sweep.harness import TrialsFailedError
from tokprune.eval.sweep.progress import Lines
from tokprune.eval.sweep.settings import make_settings, with_options
from tokprune.eval.sweep.trials import Trial
from tokprune.integrations.lmms_eval import arguments, child, driver, samples
from tokprune.integrations.lmms_eval.benchmark import LmmsBenchmark
from tokprune.integrations.lmms_eval.tasks import loading
from tokprune.integrations.lmms_eval.tasks.loading import LoadedTasks
from tokprune.integrations.lmms_eval.tasks.scores import NoScoreError, check_task, score
from tokprune.integrations.lmms_eval.wrapped import Base

BASE: dict[str, Any] = {"model": "m", "out": "o"}
LMMS: dict[str, Any] = {**BASE, "harness": "lmms-eval", "tasks": ("pope",)}

# ------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**BASE, "harness": "lmms"}, "harness='lmms' should be one of builtin, lmms-eval"),
        ({**BASE, "base": "llava_hf"}, "base='llava_hf' belongs to harness lmms-eval"),
        ({**BASE, "processes": 2}, "processes=2 belongs to harness lmms-eval"),
        ({**BASE, "model_args": {"x": 1}}, "belongs to harness lmms-eval"),
        ({**BASE, "launch": "--num_machines 2"}, "launch=--num_machines 2 belongs to harness"),
        ({**LMMS, "benchmark": "small.jsonl"}, "belongs to harness builtin, and harness is lmms"),
        ({**LMMS, "split": "val"}, "split='val' belongs to harness builtin"),
        ({**LMMS, "share": False}, "share=False belongs to harness builtin"),
        ({**LMMS, "executor": "ray"}, "executor='ray' belongs to harness builtin.* by processes"),
        ({**LMMS, "latency_rounds": 2}, "latency_rounds=2 belongs to harness builtin"),
        ({**LMMS, "tasks": None}, "tasks is missing"),
        ({**LMMS, "processes": 0}, "processes=0 should be a whole number, at least 1"),
        ({**LMMS, "launch": "--a 'b"}, "launch=.* No closing quotation"),
        ({**LMMS, "launcher": (1,)}, "launcher: 1 should be text"),
        ({**LMMS, "include_path": "nowhere"}, "'nowhere' should be a folder of tasks"),
        ({**LMMS, "model_args": "dtype"}, "should be name=value"),
        ({**LMMS, "model_args": {"pretrained": "x"}}, "'pretrained' is set by the sweep itself"),
        ({**LMMS, "model_args": ("a=1", "a=2")}, "'a=2' is given twice"),
        ({**LMMS, "model_args": {"a": [1]}}, "should be text or a number"),
        ({**LMMS, "model_args": 3}, "should be a table"),
    ],
)  # fmt: skip
def test_settings_of_the_other_harness_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**given)


def test_settings_of_lmms_eval(tmp_path: Path) -> None:
    made = Settings(
        **LMMS, launch="--num_machines 2 --rdzv_backend c10d", include_path=tmp_path,
        model_args=("attn_implementation=eager", "use_cache=True"),
    )  # fmt: skip
    assert made.batch_size == 1
    assert Settings(**BASE).batch_size == 16
    assert made.launch == ("--num_machines", "2", "--rdzv_backend", "c10d")
    assert made.include_path == (str(tmp_path),)
    assert made.model_args == {"attn_implementation": "eager", "use_cache": True}
    told = made.to_dict()
    assert told["harness"] == "lmms-eval"
    assert "benchmark" not in told
    assert "processes" not in Settings(**BASE).to_dict()
    json.dumps(told)
    again = make_settings({**told, "methods": with_options(["fastv"], [])}, "a file")
    assert again.launch == made.launch


def test_without_lmms_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'tokprune\[eval\]'"):
        run_sweep(Settings(**LMMS))


def test_commands() -> None:
    def words(**changes: Any) -> list[str]:
        return child.command(Settings(**{**LMMS, **changes}))

    plain = [sys.executable, "-m", "lmms_eval", "--config", "config.json"]
    assert words() == plain
    two = words(processes=2)
    assert two[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert two[-4:] == plain[1:]
    for pair in (["--num_processes", "2"], ["--num_machines", "1"], ["--main_process_port", "0"]):
        at = two.index(pair[0])
        assert two[at : at + 2] == pair
    assert "--multi_gpu" in two
    nodes = words(
        processes=16, launcher="srun --nodes 2",
        launch="--num_machines 2 --main_process_ip h --main_process_port 29500",
    )  # fmt: skip
    assert nodes[:4] == ["srun", "--nodes", "2", sys.executable]
    assert nodes.count("--num_machines") == nodes.count("--main_process_port") == 1
    at = nodes.index("--rdzv_backend")
    assert nodes[at : at + 4] == ["--rdzv_backend", "c10d", "--machine_rank", "0"]
    ranked = words(processes=16, launch="--num_machines 2 --machine_rank 1")
    assert "--rdzv_backend" not in ranked
    assert child.environment("cpu")["ACCELERATE_USE_CPU"] == "true"
    assert "ACCELERATE_USE_CPU" not in child.environment("cuda")


# --------------------------------------------------------------------------------- rows

ITEM = Item("t:3", "t", "i", "what ?", ("house",), {"doc_id": 3})


def logged(**changes: Any) -> dict[str, Any]:
    made = fake_lmms.sample({"model_args": "base=x"}, "t", 3)
    return {**made, **changes}


def test_a_sample_becomes_a_row() -> None:
    row = samples.sample_row("r", "none", ITEM, logged(), 12.3456)
    assert {name: row[name] for name in ("row", "trial", "item", "task", "answer", "score")} == {
        "row": "r", "trial": "none", "item": "t:3", "task": "t", "answer": "house", "score": 1.0,
    }  # fmt: skip
    assert (row["tokens_in"], row["tokens_mean"], row["macs"], row["kv_bytes"]) == (
        36, 36.0, 1000, 100,
    )  # fmt: skip
    assert (row["new_tokens"], row["seconds"], row["prefill_seconds"]) == (2, 0.75, 0.5)
    assert row["time"] == 12.346


def test_a_failed_sample_counts_as_incorrect() -> None:
    sample = logged()
    told = sample["token_counts"][0]["tokprune"]
    told |= {"status": "failed", "error": "RuntimeError: no room", "tokens_mean": None}
    row = samples.sample_row("r", "none", ITEM, sample, 0)
    assert (row["score"], row["status"], row["answer"]) == (0.0, "failed", "")
    assert row["error"] == "RuntimeError: no room"
    assert row["tokens_mean"] is None


def test_answers_are_those_before_filters_and_may_lack_numbers() -> None:
    row = samples.sample_row(
        "r", "c", ITEM, logged(resps=[["It is (A)."]], filtered_resps="A", token_counts=[None]), 0
    )
    assert row["answer"] == "It is (A)."
    assert (row["tokens_in"], row["seconds"], row["new_tokens"]) == (None, None, 0)
    assert samples.answer_text({"filtered_resps": [[-1.5, True]]}) == "-1.5"


def test_files_of_samples(tmp_path: Path) -> None:
    folder = tmp_path / "output" / "m"
    folder.mkdir(parents=True)

    def write(name: str, *lines: str) -> None:
        (folder / name).write_text("".join(line + "\n" for line in lines))

    write("20260101_000000_samples_t.jsonl", '{"doc_id": 0, "old": 1}')
    write(
        "20260102_000000_samples_t.jsonl", '{"doc_id": 0, "x": 1}', '{"doc_id": 1, "x": 2}',
        '{"doc_id": 0, "x": 3}',
    )  # fmt: skip
    write("20260102_000000_samples_a_samples_t.jsonl", '{"doc_id": 9}')
    found = samples.read_samples(tmp_path, "t")
    assert found == {"t:0": {"doc_id": 0, "x": 1}, "t:1": {"doc_id": 1, "x": 2}}
    assert samples.read_samples(tmp_path, "other") == {}
    write("20260103_000000_samples_t.jsonl", '{"doc_id": 0}', '{"doc_id"')
    with pytest.raises(ValueError, match="line 2: not a sample"):
        samples.read_samples(tmp_path, "t")
    write("20260103_000000_results.json", json.dumps({
        "results": {"t": {"alias": "t", "acc,none": 0.5, "acc,strict": 0.25, "samples": 4,
                          "acc_stderr,none": "N/A"}},
        "groups": {"g": {"acc,none": 1}},
    }))  # fmt: skip
    assert samples.read_metrics(tmp_path) == {
        "g": {"acc": 1},
        "t": {"acc": 0.5, "acc,strict": 0.25},
    }


# ------------------------------------------------------------------------------- scores


def mc(prediction: str, answer: str = "B") -> dict[str, Any]:
    options = {"A": "cat", "B": "dog", "C": "nan", "D": "nan"}
    return {"gpt_eval_score": {"answer": answer, "prediction": prediction, **options}}


def mmmu(parsed: Any, answer: str, kind: str = "open") -> dict[str, Any]:
    return {"mmmu_acc": {"answer": answer, "question_type": kind, "parsed_pred": parsed}}


@pytest.mark.parametrize(
    ("task", "logged", "wanted"),
    [
        ("pope", {"pope_accuracy": {"score": 1.0}, "pope_f1_score": {"score": 1.0}}, 1),
        ("pope_adv", {"pope_accuracy": {"score": 0.0}}, 0),
        ("mme", {"mme_cognition_score": {"category": "c", "score": 1.0}}, 1),
        ("mme", {"mme_perception_score": {"category": "c", "score": 0.0}}, 0),
        ("mmstar", {"math": {"score": 0.5}, "average": {"score": 0.5}}, 1),
        ("ocrbench", {"ocrbench_accuracy": {"score": 1, "prediction": "x"}}, 1),
        ("chartqa", {"relaxed_overall": 1.0, "relaxed_human_split": 1.0}, 1),
        ("gqa", {"exact_match": 1.0}, 1),
        ("textvqa_val", {"exact_match": 0.3, "submission": {"answer": "x"}}, 0.3),
        ("vqav2_val", {"exact_match": "0.9"}, 0.9),
        ("vizwiz_vqa_val", {"exact_match": 0.6, "submission": {}}, 0.6),
        ("scienceqa_img", {"exact_match": 0.0}, 0),
        ("seedbench", {"seed_all": {"pred": "b", "answer": "B"}, "seed_text": {}}, 1),
        ("seedbench", {"seed_all": {"pred": "C", "answer": "B"}}, 0),
        ("mmbench_en_dev", mc("B"), 1),
        ("mmbench_en_dev", mc("(b) a dog"), 1),
        ("mmbench_en_dev", mc("B. dog"), 1),
        ("mmbench_cn_dev", mc("Bad weather"), 0),
        ("mmbench_en_dev", mc("Dog."), 1),
        ("mmbench_en_dev", mc("cat"), 0),
        ("mmbench_en_dev", mc(""), 0),
        ("mmmu_val", mmmu(["C"], "C", "multiple-choice"), 1),
        ("mmmu_val", mmmu(["A"], "C", "multiple-choice"), 0),
        ("mmmu_val", mmmu([["the red one", 3.0]], "['Red', 'blue']"), 1),
        ("mmmu_val", mmmu([[2.5, "about 2.5"]], "2.50"), 1),
        ("mmmu_group_img_val", mmmu([3.0], "2.50"), 0),
        ("docvqa_val", {"anls": 0.75}, 0.75),
        ("anything", {"accuracy": True}, 1),
        ("anything", {"a": {"score": 0.5}, "b": {"correct": 0.5}, "n": "text"}, 0.5),
        ("anything", {"acc": 1.0, "acc_norm": 0.0}, 1),
        ("mmmu_val_reasoning", {"llm_as_judge_eval": 1}, 1),
    ],
)  # fmt: skip
def test_scores_of_usual_tasks(task: str, logged: dict[str, Any], wanted: float) -> None:
    common = {"doc_id": 1, "target": "0.5", "filtered_resps": "1", "token_counts": []}
    assert score(task, {**common, **logged}) == wanted


def test_tasks_without_a_score_are_named_with_what_they_log() -> None:
    for metrics, why in [
        ({"submission": {"score": 1}}, "logs submission for a document: none of them"),
        ({}, "logs nothing"),
        ({"a": 0.5, "b": 0.25}, "logs a, b for a document: several scores that differ"),
        ({"bleu": 35.2}, "logs bleu for a document: none of them a score in"),
    ]:
        with pytest.raises(NoScoreError, match=f"task 'odd' {why}"):
            score("odd", metrics)
    with pytest.raises(NoScoreError, match="choose its validation split"):
        check_task("vqav2_test", ["submission"])
    check_task("mmbench_en_test", ["submission"])  # holds what its rule reads
    check_task("odd", ["whatever"])


# ------------------------------------------------------------------------ a whole sweep


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    case.make_model(root / "model", layers=4)
    case.make_model(root / "other", layers=4, seed=1)
    case.make_benchmark(root / "bench", items=30)
    return root


@pytest.fixture
def behave(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts the stand-in where lmms-eval is; called with what trials should do wrong."""
    small = FileBenchmark(home / "bench" / "small.jsonl")
    loaded = LoadedTasks(
        {name: fake_lmms.FakeTask(small, name.split("_")[1]) for name in fake_lmms.TASKS},
        {"fake": fake_lmms.TASKS},
        dict.fromkeys(fake_lmms.TASKS, "1"),
        fake_lmms.TASKS,
    )

    def load(names: Any, include_path: Any) -> LoadedTasks:
        assert tuple(names) == ("fake_*",)
        return loaded

    monkeypatch.setattr(driver, "load_tasks", load)
    monkeypatch.setattr(driver, "lmms_version", lambda: "0.7.3")
    monkeypatch.setattr(driver, "base_parameters", lambda name, args: {"dtype", "device_map"})
    monkeypatch.setattr(child, "LMMS_EVAL", (str(Path(fake_lmms.__file__)),))
    sizes = {name: len(task.eval_docs) for name, task in loaded.tasks.items()}
    monkeypatch.setenv("FAKE_LMMS_DOCUMENTS", json.dumps(sizes))

    def behave(**trials: str) -> None:
        monkeypatch.setenv("FAKE_LMMS", json.dumps(trials))

    behave()
    return behave


@pytest.fixture
def sweep(home: Path, tmp_path: Path, behave: Any) -> Callable[..., Settings]:
    def make(**changes: Any) -> Settings:
        given: dict[str, Any] = {
            "harness": "lmms-eval", "model": str(home / changes.pop("model", "model")),
            "out": str(tmp_path / changes.pop("out", "run")), "tasks": ("fake_*",),
            "methods": ("divprune",), "keep": (9,), "controls": False, "noise": False,
            "latency": False, "device": "cpu", "calibrate": 2,
        }  # fmt: skip
        return Settings(**{**given, **changes})

    return make


class Listener(Lines):
    """Remembers what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def config_of(run: Any, trial: str) -> dict[str, Any]:
    return dict(json.loads((run.folder / "lmms" / trial / "config.json").read_text()))


def test_trials_are_answered_and_written_as_any_run(sweep: Any) -> None:
    run = run_sweep(sweep(methods=("divprune", "none", "downsample"), latency=True, limit=4))
    assert run.info["finished"]
    assert run.info["harness"] == {
        "name": "lmms-eval", "version": "0.7.3", "base": "llava_hf", "model_args": {},
    }  # fmt: skip
    told = run.info["benchmark"]
    assert (told["name"], told["items"]) == ("lmms-eval", 8)
    assert told["tasks"] == told["headline"] == list(fake_lmms.TASKS)
    assert told["groups"] == {"fake": list(fake_lmms.TASKS)}
    assert list(run.trials) == ["none", "divprune@9", "downsample@9"]
    items = {f"{task}:{n}" for task in fake_lmms.TASKS for n in range(4)}
    for trial in run.trials:
        rows = run.rows_of(trial)
        assert {row["item"] for row in rows} == items
        assert len(rows) == 8
    row = next(r for r in run.rows_of("none") if r["item"] == "fake_place:1")
    assert "what is in the lake ?" in row["question"]
    assert (row["image"], row["answers"][0]) == ("images:1.png", "house")
    metrics = run.metrics()
    assert set(metrics) == set(run.trials)
    for trial in run.trials:
        for task in fake_lmms.TASKS:
            scores = [r["score"] for r in run.rows_of(trial) if r["task"] == task]
            assert metrics[trial][task] == {"accuracy": sum(scores) / 4}
    assert run.latency is not None
    assert set(run.latency["trials"]) == {"none", "divprune@9"}
    assert run.latency["trials"]["none"] == {
        "prefill": {"median": 0.5, "q1": 0.5, "q3": 0.5, "n": 8},
        "total": {"median": 0.75, "q1": 0.75, "q3": 0.75, "n": 8},
    }
    assert run.latency["new_tokens"] == fake_lmms.GENERATED


def test_what_the_processes_get(sweep: Any) -> None:
    run = run_sweep(sweep(controls=True, methods=("divprune",), model_args={"use_cache": True}))
    for trial, entry in run.trials.items():
        if entry["status"] != "ok":
            continue
        config = config_of(run, trial)
        args = dict(part.split("=", 1) for part in config["model_args"].split(","))
        assert args["base"] == "llava_hf"
        assert Path(args["pretrained"]).is_dir()
        assert (args["dtype"], args["device_map"], args["use_cache"]) == ("float32", "cpu", "True")
        assert config["log_samples"] is True
        folder = run.folder / "lmms" / trial
        if entry["method"] is None:
            assert not (folder / "setting.json").exists()
            assert args.get("control") == {"none": None}.get(trial, entry["variant"])
        else:
            setting = (folder / "setting.json").read_bytes()
            assert hashlib.sha256(setting).hexdigest() == args["setting_sha"]
            assert json.loads(setting) == {
                "schema": 2, "method": entry["method"], "options": entry["options"],
            }  # fmt: skip
    assert "factor=2.0" in config_of(run, "downsample@9")["model_args"]


def test_noise_floor_that_a_base_cannot_show_says_why(sweep: Any) -> None:
    run = run_sweep(sweep(noise=True, methods=("none",)))
    batch, dtype = run.trials["none.batch8"], run.trials["none.bfloat16"]
    assert (batch["status"], dtype["status"]) == ("unreachable", "ok")
    assert batch["reason"] == "lmms-eval's llava_hf answers one question at a time"
    assert "dtype=bfloat16" in config_of(run, "none.bfloat16")["model_args"]
    assert len(run.rows_of("none.bfloat16")) == len(run.rows_of("none")) == 20
    with pytest.raises(ValueError, match="batch_size=2: lmms-eval's llava_hf answers one"):
        run_sweep(sweep(batch_size=2, out="other"))


def test_reports_and_group_lists_of_two_models(sweep: Any, tmp_path: Path) -> None:
    chosen = {"methods": ("divprune", "grid", "downsample"), "keep": (9, 18)}
    first = run_sweep(sweep(**chosen))
    report = build_report(first.folder, draws=200)
    text = report.html.read_text()
    assert "divprune" in text
    (nine, _) = read_groups(first.folder)
    base = {r["item"]: r["score"] for r in first.rows_of("none")}
    small = {r["item"]: r["score"] for r in first.rows_of("downsample@9")}
    assert set(nine.hard) == {i for i in base if base[i] == 1 and small[i] == 0}
    assert set(nine.easy) == {i for i in base if base[i] == 1 and small[i] == 1}
    assert nine.hard
    other = run_sweep(sweep(**chosen, model="other", out="second"))
    assert other.info["model"]["hash"] != first.info["model"]["hash"]
    report = build_report(other.folder, groups_from=first.folder, draws=200)
    (table, _) = report.groups
    assert table.groups == nine
    assert {row.result.point.variant for row in table.rows} == {"divprune", "grid"}
    rows = {r["item"]: r["score"] for r in other.rows_of("grid@9")}
    share = next(row.hard for row in table.rows if row.result.point.variant == "grid")
    assert (share.n, share.correct) == (len(nine.hard), sum(rows[i] for i in nine.hard))


# ------------------------------------------------------------------------- going wrong


def test_a_failing_trial_costs_no_other_and_is_tried_again(sweep: Any, behave: Any) -> None:
    behave(none="fail")
    progress = Listener()
    with pytest.raises(
        TrialsFailedError, match=r"1 of 2 trials .*\(none\).*status 3.*lmms/none/log"
    ):
        run_sweep(sweep(), progress=progress)
    assert any("RuntimeError: out of luck" in line for line in progress.said)
    part = read_run(sweep().out)
    assert {row["trial"] for row in part.rows} == {"divprune@9"}
    assert not part.info["finished"]
    before = (part.folder / "lmms" / "divprune@9" / "log.txt").stat().st_mtime_ns
    behave()
    whole = run_sweep(sweep())
    assert whole.info["finished"]
    assert whole.rows[:20] == part.rows
    assert {row["trial"] for row in whole.rows[20:]} == {"none"}
    assert (whole.folder / "lmms" / "divprune@9" / "log.txt").stat().st_mtime_ns == before
    behave(none="fail", **{"divprune@9": "fail"})
    assert run_sweep(sweep()).rows == whole.rows  # nothing is asked


def test_a_process_that_logs_nothing_has_failed(sweep: Any, behave: Any) -> None:
    behave(none="quiet")
    progress = Listener()
    with pytest.raises(TrialsFailedError, match=r"fake_count \(10\), fake_place \(10\)"):
        run_sweep(sweep(), progress=progress)
    assert any("judge is away" in line for line in progress.said)


def test_only_open_tasks_are_asked_again(sweep: Any, behave: Any) -> None:
    behave(none="fake_place")
    with pytest.raises(TrialsFailedError, match=r"no answer to questions of fake_place \(10\)"):
        run_sweep(sweep())
    part = read_run(sweep().out)
    assert {r["task"] for r in part.rows_of("none")} == {"fake_count"}
    behave()
    whole = run_sweep(sweep())
    assert config_of(whole, "none")["tasks"] == "fake_place"
    assert set(whole.metrics()["none"]) == set(fake_lmms.TASKS)
    assert len(whole.rows_of("none")) == 20
    assert whole.duplicates == 0


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="ends groups of processes")
def test_termination_ends_the_process_too(sweep: Any, behave: Any, tmp_path: Path) -> None:
    behave(**{"divprune@9": "hang"})
    log = tmp_path / "run" / "lmms" / "divprune@9" / "log.txt"

    def stop() -> None:
        while not (log.exists() and b"pid" in log.read_bytes()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep())
    number = int(log.read_text().split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
    part = read_run(sweep().out)
    assert not part.info["finished"]
    assert {row["trial"] for row in part.rows} == {"none"}
    behave()
    assert run_sweep(sweep()).rows[:20] == part.rows


def test_other_arguments_need_another_folder_and_new_versions_new_answers(
    sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_sweep(sweep(methods=("none",)))
    for changes, message in [
        ({"base": "llava"}, "made with harness lmms-eval, base='llava_hf'; this sweep has"),
        ({"model_args": {"x": 1}}, r"model_args=\{\}; this sweep has .*'x': 1"),
        ({"limit": 3}, "was made with limit=None"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_sweep(sweep(methods=("none",), **changes))
    monkeypatch.setattr(driver, "lmms_version", lambda: "0.8")
    second = run_sweep(sweep(methods=("none",)))
    assert second.stale == len(first.rows) == len(second.rows)


def test_code_that_changes_meanwhile_is_noticed(sweep: Any, monkeypatch: Any) -> None:
    """Every process reads the sources anew, the sweep has read them once."""
    real = child.run_child

    def meanwhile(*args: Any) -> Iterator[int]:
        yield from real(*args)
        monkeypatch.setattr("tokprune.eval.sweep.runner.code_hash", lambda runtime: "new")

    monkeypatch.setattr(child, "run_child", meanwhile)
    with pytest.raises(ValueError, match="have changed while none was answered"):
        run_sweep(sweep())
    assert read_run(sweep().out).rows == []


def test_a_folder_of_the_builtin_harness_is_refused(sweep: Any, home: Path) -> None:
    own = case.settings(
        home / "model", home / "bench" / "small.jsonl", Path(sweep().out), methods=("none",),
        limit=2,
    )  # fmt: skip
    run_sweep(own)
    with pytest.raises(ValueError, match="belongs to another benchmark: small"):
        run_sweep(sweep())


def test_progress_counts_all_processes(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for n in range(1, 4): sys.stderr.write(f'\\rtokprune:  5%|x| {n}/3 [00:01<0')\n"
        "print('\\nlast words')"
    )
    assert list(child.run_child([sys.executable, "-c", code], tmp_path, os.environ)) == [1, 2, 3]
    assert child.read_tail(tmp_path / child.LOG) == "    last words"


def test_documents_without_one_image_are_left_out_of_matching(home: Path) -> None:
    small = FileBenchmark(home / "bench" / "small.jsonl")
    benchmark = LmmsBenchmark(
        LoadedTasks(
            {"with": fake_lmms.FakeTask(small, "count"),
             "without": fake_lmms.FakeTask(small, "place", images=False)},
            {}, {"with": "1", "without": "1"}, ("with", "without"),
        )
    )  # fmt: skip
    items = benchmark.items(limit=2)
    assert [item.id for item in items] == ["with:0", "with:1", "without:0", "without:1"]
    assert benchmark.image(items[0]).mode == "RGB"
    with pytest.raises(ValueError, match="'without:0': has no single image"):
        benchmark.image(items[2])


def test_groups_that_share_tasks_are_called_once() -> None:
    groups = {"g": ("a", "b"), "h": ("b", "c")}
    assert loading.called(["a", "g", "h", "d", "c"], groups) == ("g", "c", "d")
    assert loading.called(["h", "g"], groups) == ("h", "a")


def test_paths_that_lmms_eval_cannot_be_told() -> None:
    with pytest.raises(ValueError, match="pretrained='a,b' cannot be passed to lmms-eval"):
        arguments.model_arguments(
            Settings(**LMMS), Base("x", frozenset()), Trial({"method": None, "variant": "none"}),
            "a,b", "cpu",
        )  # fmt: skip


def test_command_line(
    sweep: Any, behave: Any, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            app([
                "sweep", "--harness", "lmms-eval", "--model", str(home / "model"), "--out",
                str(tmp_path / "cli"), "--tasks", "fake_*", "--methods", "none", "--keep", "9",
                "--no-controls", "--no-noise", "--no-latency", "--device", "cpu", *more,
            ])  # fmt: skip
        return (int(caught.value.code or 0), *capsys.readouterr())  # type: ignore[return-value]

    behave(none="fail")
    status, _, err = call()
    assert status == 1
    assert "Error: 1 of 1 trials could not be answered (none)" in err
    assert "RuntimeError: out of luck" in err
    behave()
    status, out, err = call("--model-args", "a=1", "--fresh")
    assert (status, out) == (0, f"{tmp_path / 'cli'}: 20 answers in 1 trials\n"), err
    assert "a=1" in config_of(read_run(tmp_path / "cli"), "none")["model_args"]
    status, _, err = call("--benchmark", "mini.jsonl")
    assert status == 2
    assert "belongs to harness builtin" in err
