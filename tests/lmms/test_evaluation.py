"""Whole evaluations: results, samples, response cache, the command, equality with our harness."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from lmms_eval.tasks import TaskManager

from tokprune.eval.sweep import Settings, read_run, run_sweep
from tokprune.integrations.lmms_eval.tasks import TASKS

TODRE = "method=todre,keep=64"
Evaluate = Callable[..., Any]


def numbers(results: Any, task: str) -> list[dict[str, Any]]:
    samples = results["samples"][f"tokprune_mini_{task}"]
    return [sample["token_counts"][0]["tokprune"] for sample in samples]


def answers(results: Any, task: str) -> list[str]:
    return [s["filtered_resps"][0] for s in results["samples"][f"tokprune_mini_{task}"]]


def test_samples_and_results_tell_what_it_cost(evaluate: Evaluate) -> None:
    results = evaluate(TODRE, "color", "where")
    every = [n for task in ("color", "where") for n in numbers(results, task)]
    assert len(every) == 4
    assert all(n["status"] == "ok" and n["tokens_last"] == 64 for n in every)
    throughput = results["throughput"]
    for name in ("tokens_mean", "macs", "macs_unpruned", "kv_bytes", "images", "new_tokens"):
        assert throughput[f"avg_tokprune_{name}"] == pytest.approx(fmean(n[name] for n in every))
    assert throughput["avg_tokprune_seconds"] == pytest.approx(
        throughput["total_elapsed_time"] / 4, rel=1e-5
    )
    assert throughput["total_gen_tokens"] == sum(n["new_tokens"] for n in every)
    assert throughput["avg_tokprune_failed"] == 0
    assert (
        results["config"]["model_backend"]
        == "tokprune.integrations.lmms_eval.model.TokpruneLlavaHf (chat)"
    )
    assert results["config"]["model_args"].endswith(TODRE)


def test_failed_sample_is_a_wrong_answer(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlavaForConditionalGeneration

    generate, count = LlavaForConditionalGeneration.generate, iter(range(10))

    def sometimes(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(count) == 0:
            raise torch.OutOfMemoryError("full")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", sometimes)
    results = evaluate(TODRE, "color")
    first, second = numbers(results, "color")
    assert (first["status"], first["error"]) == ("failed", "OutOfMemoryError: full")
    assert second["status"] == "ok"
    assert results["results"]["tokprune_mini_color"]["accuracy,none"] == 0.5
    assert results["throughput"]["avg_tokprune_failed"] == 0.5


# --------------------------------------------------------------------------------- cache


def test_cached_answers_are_never_those_of_another_method(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    cache = {"use_cache": str(tmp_path / "cache"), "limit": 3}
    plain = evaluate("", "word", **cache)
    assert answers(plain, "word") == [s["target"] for s in plain["samples"]["tokprune_mini_word"]]
    for more in ("control=blind", "method=todre,keep=4", "method=todre,keep=64"):
        other = evaluate(more, "word", **cache)
        assert all(n["status"] == "ok" for n in numbers(other, "word")), "an answer was replayed"
        if more != "method=todre,keep=64":
            assert answers(other, "word") != answers(plain, "word")
    again = evaluate("control=blind", "word", **cache)
    samples = again["samples"]["tokprune_mini_word"]
    assert [s["token_counts"] for s in samples] == [[None]] * 3  # replayed, and so without numbers
    assert "throughput" not in again
    assert answers(again, "word") == answers(evaluate("control=blind", "word", limit=3), "word")


def test_cache_knows_the_content_of_a_setting(evaluate: Evaluate, tmp_path: Path) -> None:
    path = tmp_path / "setting.json"
    for keep in (64, 4):
        path.write_text(json.dumps({"method": "todre", "options": {"keep": keep}}))
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        results = evaluate(f"setting={path},setting_sha={sha}", "word", use_cache=str(tmp_path))
        assert [n["tokens_last"] for n in numbers(results, "word")] == [keep, keep]


def test_failures_are_not_cached(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlavaForConditionalGeneration

    with monkeypatch.context() as patch:
        patch.setattr(LlavaForConditionalGeneration, "generate", lambda *_, **__: 1 / 0)
        results = evaluate(TODRE, "color", use_cache=str(tmp_path))
        assert all(n["status"] == "failed" for n in numbers(results, "color"))
    results = evaluate(TODRE, "color", use_cache=str(tmp_path))
    assert all(n["status"] == "ok" for n in numbers(results, "color"))


# --------------------------------------------------------------------------------- tasks


def test_tasks_see_the_wrapped_model_s_name(evaluate: Evaluate, tmp_path: Path) -> None:
    """Tasks hold prompts for certain models; those for the base are meant."""
    (tmp_path / "_mini").write_text((TASKS / "_mini").read_text())
    (tmp_path / "task.yaml").write_text(
        "include: _mini\ntask: tokprune_mini_named\ntest_split: color\n"
        "doc_to_text: !function prompts.doc_to_text\n"
        "lmms_eval_specific_kwargs:\n  default: {end: default}\n  llava_hf: {end: llava}\n"
    )
    (tmp_path / "prompts.py").write_text(
        "def doc_to_text(doc, kwargs):\n    return doc['question'] + ' ' + kwargs['end']\n"
    )
    manager = TaskManager("INFO", include_path=str(tmp_path), include_defaults=False,
                          model_name="tokprune")  # fmt: skip
    from lmms_eval.evaluator import simple_evaluate

    results = simple_evaluate(
        "tokprune", "base=llava_hf,pretrained=mini,dtype=float32", device="cpu", limit=1,
        tasks=["tokprune_mini_named"], task_manager=manager, batch_size=1, bootstrap_iters=0,
    )  # fmt: skip
    (sample,) = results["samples"]["tokprune_mini_named"]
    assert sample["arguments"][0].endswith(" llava")


# ------------------------------------------------------------------------------- command


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [
            sys.executable, "-m", "lmms_eval", "--model", "tokprune",
            "--model_args", f"base=llava_hf,pretrained=mini,dtype=float32,{TODRE}",
            "--tasks", "tokprune_mini_color", "--include_path", str(TASKS), "--limit", "2",
            "--device", "cpu", "--batch_size", "1", "--output_path", str(out), "--log_samples",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, text=True, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    (log,) = out.rglob("*_samples_tokprune_mini_color.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    assert [s["token_counts"][0]["tokprune"]["tokens_last"] for s in samples] == [64, 64]
    (summary,) = out.rglob("*_results.json")
    results = json.loads(summary.read_text())
    assert results["throughput"]["avg_tokprune_tokens_last"] == 64
    assert results["results"]["tokprune_mini_color"]["accuracy,none"] == fmean(
        s["accuracy"] for s in samples
    )


# ---------------------------------------------------------------------------- end to end

SHARED = (
    "tokens_in", "tokens_last", "tokens_mean", "macs", "macs_unpruned", "kv_bytes",
    "kv_bytes_unpruned", "prompt_tokens", "new_tokens",
)  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two methods at two budgets and the controls on a question of each type, by our own
    harness."""
    out = tmp_path_factory.mktemp("own") / "run"
    run_sweep(Settings(
        model="mini", out=str(out), benchmark="mini", split="test",
        methods=("todre", "visionzip", "blind", "downsample"), keep=(64, 16), controls=False,
        batch_size=1, limit=12, noise=False, latency=False, device="cpu", dtype="float32",
        calibrate=2,
    ))  # fmt: skip
    return read_run(str(out))


@pytest.mark.parametrize(
    "trial",
    ["none", "blind", "downsample@64", "todre@64", "todre@16", "visionzip@64", "visionzip@16"],
)
def test_numbers_are_those_of_our_own_harness(
    own: Any, evaluate: Evaluate, tmp_path: Path, trial: str
) -> None:
    entry = own.trials[trial]
    rows = {row["item"]: row for row in own.rows if row["trial"] == trial}
    if entry["method"] is None:
        factor = entry["options"].get("factor")
        more = {"none": "", "blind": "control=blind"}.get(
            entry["variant"], f"control=downsample,factor={factor!r}"
        )
    else:
        path = tmp_path / "setting.json"
        path.write_text(json.dumps({"method": entry["method"], "options": entry["options"]}))
        more = f"setting={path},setting_sha={hashlib.sha256(path.read_bytes()).hexdigest()}"
    results = evaluate(more, "all", limit=1)
    samples = [s for task in results["samples"].values() for s in task]
    assert {s["doc"]["id"] for s in samples} == set(rows)
    assert len(samples) == 12
    for sample in samples:
        row, told = rows[sample["doc"]["id"]], sample["token_counts"][0]["tokprune"]
        assert sample["filtered_resps"] == [row["answer"]]
        assert sample["accuracy"] == row["score"]
        assert {n: told[n] for n in SHARED} == {n: row[n] for n in SHARED}
        assert told["status"] == row["status"] == "ok"
    scores = fmean(row["score"] for row in rows.values())
    assert results["results"]["tokprune_mini_all"]["accuracy,none"] == pytest.approx(scores)
