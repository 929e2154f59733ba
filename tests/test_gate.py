"""The engagement gate: what passes for a result, and every known way of not acting."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sweep_case
import torch
from fake_run import make_run
from transformers import DynamicCache

from tokprune.eval.recommend import recommend
from tokprune.eval.report import analyse, load_run
from tokprune.eval.report.compare import differences
from tokprune.eval.sweep import evaluator, read_run, run_sweep
from tokprune.eval.sweep.evidence import FirstLogits, cache_entries, input_digest
from tokprune.eval.sweep.gate import gates
from tokprune.eval.sweep.settings import Settings

N = 40


def trial(name: str, **changes: Any) -> dict[str, Any]:
    entry = {
        "trial": name, "variant": name.partition("@")[0], "method": name.partition("@")[0],
        "options": {}, "budget": 9, "match": "mean", "dtype": "float32", "batch_size": 1,
        "noise": False,
    }  # fmt: skip
    return {**entry, **changes}


NONE = trial("none", method=None, budget=36)
BLIND = trial("blind", method=None, budget=36)
NOISE = trial("none.batch8", variant="none", method=None, budget=36, noise=True, batch_size=8)


def answers(name: str, changed: int = 0, moved: int = N, **changes: Any) -> list[dict[str, Any]]:
    """Rows of a trial: ``changed`` of them with another answer than the unpruned model's (and
    incorrect), ``moved`` with other logits."""
    plain = name.startswith("none")
    rows = []
    for n in range(N):
        row = {
            "trial": name, "item": f"q{n}", "answer": f"thing {n % 4 + (n < changed)}",
            "score": float(n >= changed), "status": "ok", "tokens_in": 36,
            "tokens_mean": 36.0 if plain else 9.0, "tokens_last": 36.0 if plain else 9.0,
            "kv_bytes": 400 if plain else 130,
            "evidence": {
                "inputs": f"in{n}", "kept": None if plain else f"{name}{n}",
                "cache": 40.0 if plain else 13.0, "ids": [5, 6, 7],
                "logits": [10.0 + (n < moved and not plain), 4.0, 1.0], "finite": True,
                "images": 1,
            },
        }  # fmt: skip
        rows.append({**row, **changes})
    return rows


def evidence(rows: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    """The rows with something else in their evidence; a function is given the row's number."""
    found = []
    for n, row in enumerate(rows):
        own = {k: v(n) if callable(v) else v for k, v in changes.items()}
        found.append({**row, "evidence": {**row["evidence"], **own}})
    return found


def judge(rows: list[dict[str, Any]], *more: Any, **changes: Any) -> Any:
    """The gate of a method whose answers these are."""
    trials = [NONE, trial("todre@9", **changes), *(t for t, _ in more)]
    every = answers("none", moved=0) + rows + [row for _, own in more for row in own]
    return gates(trials, every)["todre@9"]


def test_a_method_that_acts_passes() -> None:
    gate = judge(answers("todre@9", changed=5))
    assert gate.outcome == "ok"
    assert gate.reason == ""
    texts = {check.name: check.text for check in gate.checks}
    assert texts["answers moved"] == "5 of 40 answers changed (+0 −5 correct)"
    assert texts["really shorter"] == "the cache is shorter in 40 of 40 answers"
    assert set(texts) == {
        "complete", "same inputs", "kept as planned", "really shorter", "logits moved",
        "answers moved", "not empty", "not constant", "finite", "plausible",
    }  # fmt: skip


STUB = answers("todre@9", moved=0)
FAILED = {"status": "failed", "answer": "", "score": 0.0, "evidence": None}


@pytest.mark.parametrize(
    ("rows", "outcome", "reason"),
    [
        # a record says that it ran, and nothing came of it
        (STUB, "fail", "logits moved in 0 of 40 answers"),
        # token ids renamed, or a mask computed and not applied: the cache is as long as ever
        (evidence(answers("todre@9", 5), cache=40.0), "fail", "cache is shorter in 0 of 40"),
        # the budget is ignored
        (answers("todre@9", 5, tokens_mean=36.0), "fail", "36.0 tokens of 9"),
        # a hook that saw nothing leaves no record
        (answers("todre@9", 5, tokens_mean=None), "fail", "40 answers have no record"),
        # sliced away
        (answers("todre@9", 5, answer=""), "fail", "40 of 40 answers are empty (0 unpruned)"),
        (answers("todre@9", 5, answer="A"), "fail", "commonest answer 'a': 100% (25% unpruned)"),
        (
            evidence(answers("todre@9", 5), finite=lambda n: n != 3),
            "fail",
            "NaN or infinite logits in 1 of 40 answers",
        ),
        # other frames than the baseline's
        (
            evidence(answers("todre@9", 5), inputs=lambda n: f"in{n - (n > 37)}"),
            "fail",
            "2 of 40 prompts or images are others",
        ),
        (answers("todre@9", 5)[:30], "warn", "10 of 40 questions lack an answer"),
        (
            [{**row, **(FAILED if n < 5 else {})} for n, row in enumerate(answers("todre@9", 9))],
            "fail",
            "5 of 40 questions failed (0 unpruned)",
        ),
        # mild settings: few logits, or no answer
        (answers("todre@9", 5, moved=15), "warn", "logits moved in 15 of 40 answers"),
        (answers("todre@9", 0), "ok", ""),
        (answers("todre@9", 5, moved=0), "warn", "logits moved in 0 of 40 answers"),
        # a mean over images of several sizes
        (
            [{**row, "tokens_mean": 9.0 + n % 4} for n, row in enumerate(answers("todre@9", 5))],
            "warn",
            "10.5 tokens of 9",
        ),
    ],
)
def test_known_failures(rows: list[dict[str, Any]], outcome: str, reason: str) -> None:
    gate = judge(rows)
    assert gate.outcome == outcome, gate
    assert reason in gate.reason


def test_budgets_are_those_of_an_image() -> None:
    rows = evidence(answers("todre@9", 5, tokens_mean=18.0, tokens_in=72), images=2)
    assert judge(rows).outcome == "ok"
    told = [{**row, "evidence": None} for row in rows]  # nobody says how many images there were
    assert judge(told).outcome == "warn"
    unknown = [{**row, "evidence": None, "tokens_mean": None} for row in rows]
    assert "40 answers have no record" in judge(unknown).reason
    assert judge(unknown).outcome == "warn"


def test_noise_decides_what_has_moved() -> None:
    rows = answers("todre@9", 5)
    quiet = evidence(answers(NOISE["trial"]), logits=[10.05, 4.0, 1.0])
    loud = evidence(answers(NOISE["trial"]), logits=[10.2, 4.0, 1.0])
    assert judge(rows, (NOISE, quiet)).outcome == "ok"  # 1 > 10 × 0.05
    gate = judge(rows, (NOISE, loud))
    assert gate.outcome == "warn"
    assert "logits moved in 0 of 40" in gate.reason
    other = {**NOISE, "dtype": "bfloat16"}  # a difference of its own
    assert judge(rows, (other, loud)).outcome == "ok"


def test_a_budget_of_all_tokens_has_nothing_to_show() -> None:
    rows = evidence(answers("todre@9", moved=0, tokens_mean=36.0), cache=40.0)
    assert judge(rows, budget=36).outcome == "ok"


def test_without_logits_no_flip_among_many_is_a_failure() -> None:
    """Answers that another harness has asked for."""
    few = [{**row, "evidence": None} for row in answers("todre@9", 0)]
    assert judge(few).outcome == "warn"
    many = [
        {**row, "item": f"{row['item']}.{k}", "evidence": None}
        for k in range(3)
        for row in [*answers("none"), *answers("todre@9", 0)]
    ]
    gate = gates([NONE, trial("todre@9")], many)["todre@9"]
    assert gate.outcome == "fail"
    assert "0 of 120 answers changed" in gate.reason
    longer = [{**row, "kv_bytes": 400} for row in few]
    assert "shorter in 0 of 40" in judge(longer).reason


def test_the_same_under_two_names() -> None:
    other = trial("visionzip@9")
    same = evidence(answers("visionzip@9", 5), kept=lambda n: f"todre@9{n}")
    trials, rows = [NONE, trial("todre@9"), other], answers("none") + answers("todre@9", 5)
    found = gates(trials, rows + same)
    assert found["todre@9"].outcome == "ok"
    assert found["visionzip@9"].reason == "the same as todre@9: same tokens, same answers"
    assert gates(trials, rows + answers("visionzip@9", 5))["visionzip@9"].outcome == "ok"


def test_better_than_possible_is_looked_at() -> None:
    none = [{**row, "score": float(n < 20)} for n, row in enumerate(answers("none", moved=0))]
    found = gates([NONE, trial("todre@9")], none + answers("todre@9", 1))
    assert "accuracy 97.5% (unpruned 50.0%)" in found["todre@9"].reason
    blind = [{**row, "score": 0.9} for row in answers("blind")]
    rows = answers("none", moved=0) + answers("todre@9", 30) + blind
    assert "blind 90.0%" in gates([NONE, BLIND, trial("todre@9")], rows)["todre@9"].reason


def test_yes_to_everything() -> None:
    none = [{**row, "answer": ("yes", "no")[n % 2]} for n, row in enumerate(answers("none"))]
    rows = [
        {**row, "answer": ("yes", "no")[n % 5 == 0]} for n, row in enumerate(answers("todre@9"))
    ]
    gate = gates([NONE, trial("todre@9")], none + rows)["todre@9"]
    assert "commonest answer 'yes': 80% (50% unpruned)" in gate.reason
    rows = [
        {**row, "answer": ("yes", "no")[n % 3 == 0]} for n, row in enumerate(answers("todre@9"))
    ]
    gate = gates([NONE, trial("todre@9")], none + rows)["todre@9"]
    assert "yes: 65% of answers (50% unpruned)" in gate.reason


def test_controls_of_smaller_images_have_other_inputs() -> None:
    rows = evidence(answers("downsample@9", 5, tokens_mean=36.0), inputs=None, cache=40.0)
    control = trial("downsample@9", method=None)
    assert gates([NONE, control], answers("none") + rows)["downsample@9"].outcome == "ok"


# ------------------------------------------------------------------------- what is recorded


def test_first_logits() -> None:
    first = FirstLogits()
    scores = torch.tensor([[1.0, 5.0, -torch.inf, 2.0], [0.0, 1.0, 2.0, 3.0]])
    assert torch.equal(first(torch.zeros(2, 1), scores), scores)
    later = scores.clone()
    later[1, 0] = torch.nan
    first(torch.zeros(2, 2), later)
    (ids, logits, finite), (_, _, broken) = first.rows()
    assert (ids[:3], logits[:3]) == ([1, 3, 0], [5.0, 2.0, 1.0])
    assert (finite, broken) == (True, False)


def test_cache_entries() -> None:
    cache = DynamicCache()
    for layer, length in enumerate((10, 4)):
        cache.update(torch.zeros(1, 2, length, 8), torch.zeros(1, 2, length, 8), layer)
    # three answer tokens, the last of which was never put in
    assert cache_entries(cache, 3) == (10 + 4) / 2 - 2
    assert cache_entries(None, 3) is None


def test_input_digest() -> None:
    image = sweep_case.landscape()
    same = input_digest([1, 2], [image])
    assert input_digest([1, 2], [image.copy()]) == same
    assert input_digest([1, 3], [image]) != same
    assert input_digest([1, 2], [image.rotate(90)]) != same
    assert input_digest([1, 2], [image, image]) != same


# ------------------------------------------------------------------------- in a sweep


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        model=str(sweep_case.make_model(tmp_path / "model")), out=str(tmp_path / "run"),
        benchmark=str(sweep_case.make_benchmark(tmp_path / "questions", 24)),
        methods=("visionzip", "divprune"), keep=("9",), controls=False, noise=False,
        latency=False, batch_size=4, max_new_tokens=3,
    )  # fmt: skip


def test_a_sweep_records_what_the_gate_needs(settings: Settings, tmp_path: Path) -> None:
    run = run_sweep(settings)
    found = run.gates()
    assert {name: gate.of("fail") for name, gate in found.items()} == {
        "visionzip@9": [], "divprune@9": [],
    }  # fmt: skip
    # two names, one input; other tokens
    rows = {(row["trial"], row["item"]): row["evidence"] for row in run.rows}
    for (name, item), own in rows.items():
        assert own["inputs"] == rows["none", item]["inputs"]
        assert own["finite"]
        assert len(own["ids"]) == len(own["logits"]) == 8
        assert own["logits"] == sorted(own["logits"], reverse=True)
        assert (own["cache"] < rows["none", item]["cache"]) == (name != "none")
    assert rows["visionzip@9", "q0"]["kept"] != rows["divprune@9", "q0"]["kept"]
    written = json.loads((tmp_path / "run" / "run.json").read_text())["trials"]
    assert {t["trial"]: t.get("gate", {}).get("outcome") for t in written}["divprune@9"] in (
        "ok", "warn",
    )  # fmt: skip


def test_hooks_that_are_gone_in_the_middle(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy without hooks answers: what a graph compiled before the patch, or a script that puts
    methods on classes, does."""
    original: Callable[..., Any] = evaluator.generate_answers
    calls = 0

    def generate(loaded: Any, inputs: Any, most: int) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            loaded = replace(loaded, model=bare)
        return original(loaded, inputs, most)

    bare = evaluator.LoadedModel.load(settings.model, "auto", "cpu", False).model
    monkeypatch.setattr(evaluator, "generate_answers", generate)
    run = run_sweep(settings)
    found = run.gates()
    assert {gate.outcome for gate in found.values()} == {"fail"}
    assert all("questions failed" in gate.reason for gate in found.values())


@pytest.mark.parametrize("what", ["generate", "trace"])
def test_a_trace_that_says_more_than_happened(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The record is that of a method at work, the answers are those of the model alone."""
    original: Callable[..., Any] = evaluator.generate_answers

    def generate(loaded: Any, inputs: Any, most: int) -> Any:
        acted = original(loaded, inputs, most)
        plain = original(replace(loaded, model=bare), inputs, most)
        # the tokens really go, and nobody looks at what is left
        if what == "trace":
            return plain
        return [replace(own, cache=short.cache) for own, short in zip(plain, acted, strict=True)]

    bare = evaluator.LoadedModel.load(settings.model, "auto", "cpu", False).model
    monkeypatch.setattr(evaluator, "generate_answers", generate)
    for gate in run_sweep(settings).gates().values():
        assert gate.outcome == "fail"
        assert "logits moved in 0 of 24 answers" in gate.reason
        assert ("the cache is shorter in 0 of 24" in gate.reason) == (what == "trace")


# ------------------------------------------------------------------------- in what comes of it


@pytest.fixture
def inert(tmp_path: Path) -> Path:
    """A run in which the best method never acted: its answers are the unpruned model's."""
    folder = make_run(tmp_path / "run", count=120, methods=("divprune", "todre"))
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    plain = {row["item"]: row for row in rows if row["trial"] == "none"}
    for row in rows:
        if row["trial"] == "divprune@64":
            row |= {name: plain[row["item"]][name] for name in ("answer", "score")}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_method_that_did_not_act_counts_nowhere(inert: Path) -> None:
    analysis = analyse(load_run(inert), at=64)
    by_name = {r.point.name: r for r in analysis.results}
    point = by_name["divprune @ 64"]
    assert not point.counts
    assert point.on == ()
    assert by_name["divprune @ 16"].counts
    assert "divprune" not in differences(analysis).variants
    found = recommend(inert, max_drop=0.5)
    assert found.setting["evidence"]["trial"] != "divprune@64"


def test_the_report_marks_it(inert: Path) -> None:
    from tokprune.eval.report import build_report

    report = build_report(inert, at=64)
    text = report.markdown.read_text()
    assert "1 points are no results, and count nowhere: divprune @ 64" in text
    assert "~~divprune ✗~~" in text
    assert "0 of 120 answers changed" in text
    page = report.html.read_text()
    assert "class=struck" in page
    assert "no result" in page  # the legend of the plots


def test_the_command_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokprune.cli import app

    original: Callable[..., Any] = evaluator.generate_answers
    bare = evaluator.LoadedModel.load(settings.model, "auto", "cpu", False).model

    def generate(loaded: Any, inputs: Any, most: int) -> Any:
        original(loaded, inputs, most)
        return original(replace(loaded, model=bare), inputs, most)

    monkeypatch.setattr(evaluator, "generate_answers", generate)
    words = ["sweep", "--model", settings.model, "--out", settings.out, "--no-controls",
             "--no-noise", "--no-latency", "--methods", "divprune", "--keep", "9",
             "--benchmark", str(settings.benchmark), "--max-new-tokens", "3"]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        app(words)
    assert stop.value.code == 3
    assert "NOT A RESULT: divprune@9: the cache is shorter in 0 of 24" in capsys.readouterr().err
    parquet = Path(settings.out) / "rows.parquet"
    read_run(settings.out).to_parquet(parquet)
    pyarrow = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.read_table(parquet).to_pylist()
    assert {row["gate"] for row in table if row["trial"] == "divprune@9"} == {"fail"}
    assert json.loads(table[0]["evidence"])["finite"]
