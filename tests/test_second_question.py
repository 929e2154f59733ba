"""Another question on the cache of a first one: what is asked, and what is made of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import family_processors
import numpy as np
import pytest
import sweep_case
import torch
from fake_run import make_run

from tokprune.eval.benchmarks import load_benchmark
from tokprune.eval.report import build_report
from tokprune.eval.second_question.asking import Answered, Prompts, ask_image
from tokprune.eval.second_question.measures import (
    HEADER_FILE,
    ROWS_FILE,
    measure,
    read_second_questions,
)
from tokprune.eval.second_question.run import ask_second_questions, draw_groups
from tokprune.eval.second_question.section import second_question_section
from tokprune.eval.sweep import run_sweep
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.eval.sweep.settings import Settings
from tokprune.inputs.prompts import conversation_text, model_inputs
from tokprune.methods import DivPrune, FastV, MMTok
from tokprune.methods.scoring import PromptSelector


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("second")
    sweep_case.make_model(root / "model")
    sweep_case.make_benchmark(root / "questions", 12)
    return root


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Prompts:
    loaded = LoadedModel.load(str(folder / "model"), "auto", "cpu")
    benchmark = load_benchmark(str(folder / "questions" / "small.jsonl"))
    benchmark.max_new_tokens = 4
    items = benchmark.items()
    return Prompts(loaded, benchmark, [i for i in items if i.image_id == items[0].image_id])


def asked(
    prompts: Prompts, method: Any, history: Any = "none"
) -> dict[tuple[str, str, str], Answered]:
    rows = list(ask_image(prompts, {"none": None, "own": method}, history))
    assert not [row.error for row in rows if row.error]
    found = {(row.trial, row.first.id, row.second.id): row for row in rows}
    n = len(prompts.items)
    assert len(found) == len(rows) == 2 * n * n
    return found


# ------------------------------------------------------------------------- what is asked


def test_prompts_share_everything_up_to_the_question(prompts: Prompts) -> None:
    ids = [own["input_ids"][0] for own in prompts.inputs]
    assert len(ids) == 4
    assert all(torch.equal(own[: prompts.prefix], ids[0][: prompts.prefix]) for own in ids)
    assert len({int(own[prompts.prefix]) for own in ids}) > 1
    image = prompts.loaded.model.config.image_token_id
    assert all((own[prompts.prefix :] != image).all() for own in ids)


def test_a_method_that_does_not_read_the_question_carries_nothing_over(prompts: Prompts) -> None:
    found = asked(prompts, DivPrune(keep=9))
    for (trial, first, second), row in found.items():
        assert row.answer == found[trial, second, second].answer, (trial, first, second)
        assert row.overlap == (1.0 if trial == "own" else None)
        if trial == "none":
            single = prompts.inputs[[i.id for i in prompts.items].index(second)]
            assert row.answer == generated(prompts, single)


def generated(prompts: Prompts, inputs: Any) -> str:
    model, tokenizer = prompts.loaded.model, prompts.loaded.processor.tokenizer
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    new = out[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


@dataclass(frozen=True)
class These(PromptSelector):
    """Keeps the tokens that it is told."""

    name: ClassVar[str] = "these"
    tokens: tuple[int, ...] = ()

    def select(self, image: Any, keep: int) -> torch.Tensor:
        return torch.tensor(self.tokens)


def test_tokens_are_those_of_the_first_question(prompts: Prompts) -> None:
    """What a method chose under the first question, forced upon the second by hand, answers the
    same; under the second question it chooses others."""
    from tokprune import compress

    method = MMTok(keep=5)
    found = asked(prompts, method)
    different = 0
    for first, inputs in zip(prompts.items, prompts.inputs):
        with compress(prompts.loaded.model, method) as trace, torch.inference_mode():
            prompts.loaded.model(**inputs)
        assert trace.last is not None
        column = trace.last.layers[-1].column[0][trace.last.layers[-1].segment[0] >= 0]
        begin = int(trace.last.images[0].columns[0])
        these = These(keep=5, tokens=tuple(sorted(int(c) - begin for c in column)))
        for second, other in zip(prompts.items, prompts.inputs):
            with compress(prompts.loaded.model, these):
                want = generated(prompts, other)
            row = found["own", first.id, second.id]
            assert row.answer == want
            different += row.overlap is not None and row.overlap < 1
    assert different > 0


def test_a_second_question_in_a_conversation(prompts: Prompts) -> None:
    """The unpruned model's answers are those to the whole conversation at once, without a cache."""
    found = asked(prompts, FastV(keep=9, prune_before=4), "own")
    processor = prompts.loaded.processor
    for first in prompts.items[:2]:
        for second in prompts.items[2:]:
            told = found["none", first.id, first.id].answer
            suffix = prompts.benchmark.prompt_suffix
            text = conversation_text(
                processor, [first.question + suffix, told, second.question + suffix]
            )
            assert text.lower().count("assistant") == 2
            inputs = model_inputs(processor, [text], [prompts.visual], model=prompts.loaded.model)
            row = found["none", first.id, second.id]
            assert row.answer == generated(prompts, dict(inputs))


@pytest.mark.parametrize("family", ["qwen2.5-vl", "gemma3"])
@pytest.mark.parametrize("history", ["none", "own"])
def test_other_families(family: str, history: str, folder: Path, tmp_path: Path) -> None:
    """Positions of three axes, and image tokens that see each other both ways."""
    loaded = LoadedModel.load(str(family_processors.save(tmp_path, family)), "auto", "cpu")
    benchmark = load_benchmark(str(folder / "questions" / "small.jsonl"))
    benchmark.max_new_tokens = 4
    items = benchmark.items()
    prompts = Prompts(loaded, benchmark, [i for i in items if i.image_id == items[0].image_id][:3])
    if (family, history) == ("gemma3", "none"):  # its layers slide a window
        with pytest.raises(ValueError, match=r"cannot be cut back.*use history='own'"):
            asked(prompts, DivPrune(keep=4), history)
        return
    found = asked(prompts, DivPrune(keep=4), history)
    for (trial, first, second), row in found.items():
        numbers = [
            next(n for n, i in enumerate(prompts.items) if i.id == q) for q in (first, second)
        ]
        own, other = numbers
        if trial == "none" and (history == "none" or own == other):
            assert row.answer == generated(prompts, prompts.inputs[other])
        elif trial == "none":
            told = found["none", first, first].answer
            assert row.answer == generated(prompts, prompts.conversation(own, told, other))
        elif history == "none":
            assert row.answer == found[trial, second, second].answer


def test_prompts_that_part_before_the_image(prompts: Prompts, monkeypatch: Any) -> None:
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
        "{% endif %}{% endfor %}<image>{% endfor %}"
    )
    monkeypatch.setattr(prompts.loaded.processor, "chat_template", template)
    with pytest.raises(ValueError, match="before the image ends"):
        Prompts(prompts.loaded, prompts.benchmark, prompts.items)


def test_images_are_drawn_until_there_are_enough_pairs(folder: Path) -> None:
    items = load_benchmark(str(folder / "questions" / "small.jsonl")).items()
    one = draw_groups(items, 1, 0)
    assert [len(group) for group in one] == [4]
    assert len(draw_groups(items, 13, 0)) == 2
    assert len(draw_groups(items, 10**6, 0)) == 3
    assert draw_groups(items, 13, 0) == draw_groups(items, 13, 0)
    assert {g[0].image_id for s in range(9) for g in draw_groups(items, 1, s)} == {
        i.image_id for i in items
    }  # fmt: skip
    assert draw_groups(items[:1], 5, 0) == []


# ------------------------------------------------------------------------- what is made of it


def rows_of(images: int = 60, carry: int = 0) -> list[dict[str, Any]]:
    """Two questions an image; of the first ``carry`` images the second question is lost where the
    first was asked before, alone it is lost in every third image."""
    rows = []
    for n in range(images):
        for trial in ("none", "fastv@9"):
            for a in "xy":
                for b in "xy":
                    score = 1.0
                    if trial != "none":
                        score = float(n % 3 != 0 and (a == b or n >= carry))
                    rows.append({
                        "trial": trial, "image": f"i{n}", "first": f"{n}{a}", "second": f"{n}{b}",
                        "task": "t", "answer": "", "score": score, "error": None,
                        "overlap": None if trial == "none" else 1.0 if a == b else 0.25,
                    })  # fmt: skip
    return rows


def test_carry_over() -> None:
    (found,) = measure(rows_of(60, 15), draws=500)
    assert (found.trial, found.pairs, found.images, found.failed) == ("fastv@9", 120, 60, 0)
    assert found.unpruned == 1
    assert found.alone == pytest.approx(2 / 3)
    # of 15 images, ten are not lost alone
    assert found.after == pytest.approx(30 / 60)
    assert found.first_loss == pytest.approx(1 / 3)
    assert found.second_loss == pytest.approx(1 / 2)
    assert found.carry_over == pytest.approx(10 / 60)
    low, high = found.interval
    assert 0.05 < low < 10 / 60 < high < 0.3
    assert (found.flips.lost, found.flips.gained) == (60, 0)
    assert found.p == pytest.approx(2 * 0.5**60)
    assert found.dependence == pytest.approx(0.75)
    assert found.safe is None


def test_safe_needs_pairs_and_a_narrow_interval() -> None:
    (found,) = measure(rows_of(300, 0), draws=200)
    assert (found.carry_over, found.interval, found.safe) == (0, (0, 0), True)
    (found,) = measure(rows_of(300, 20), draws=200)
    assert found.safe is False


def test_a_history_that_harms_the_unpruned_model_is_not_the_methods() -> None:
    rows = rows_of(60, 0)
    for row in rows:
        if row["first"] != row["second"]:
            row["score"] = 0.0 if row["image"] in ("i1", "i2") else row["score"]
    (found,) = measure(rows, draws=100)
    assert found.unpruned == pytest.approx(58 / 60)
    assert found.carry_over == 0  # both lose the same two


# ------------------------------------------------------------------------- in a run folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    settings = Settings(
        model=str(folder / "model"), out=str(folder / "run"),
        benchmark=str(folder / "questions" / "small.jsonl"), methods=("divprune", "fastv"),
        keep=("18", "9"), controls=False, noise=False, latency=False, batch_size=4,
        max_new_tokens=3, match="last",
    )  # fmt: skip
    return run_sweep(settings).folder


def clear(run: Path) -> None:
    for name in (HEADER_FILE, ROWS_FILE):
        (run / name).unlink(missing_ok=True)


def test_asks_with_the_trials_of_a_run(run: Path) -> None:
    clear(run)
    chosen = ask_second_questions(run, pairs=20, trials=["divprune@9", "fastv@18"])
    assert chosen == ["none", "divprune@9", "fastv@18"]
    found = read_second_questions(run)
    assert found is not None
    assert [(own.trial, own.pairs, own.images) for own in found.carried] == [
        ("divprune@9", 24, 2), ("fastv@18", 24, 2),
    ]  # fmt: skip
    assert found.carried[0].carry_over == 0
    assert found.carried[0].dependence == 0
    assert found.carried[1].dependence > 0
    # what was interrupted in the middle of an image goes on with that image
    lines = (run / ROWS_FILE).read_text().splitlines(keepends=True)
    (run / ROWS_FILE).write_text("".join(lines[:70]) + lines[70][:20])
    ask_second_questions(run, pairs=20, trials=["divprune@9", "fastv@18"])
    assert sorted((run / ROWS_FILE).read_text().splitlines(keepends=True)) == sorted(lines)
    with pytest.raises(ValueError, match=r"answers of other settings \(history\)"):
        ask_second_questions(run, pairs=20, trials=["divprune@9", "fastv@18"], history="own")


def test_the_report_has_it(run: Path) -> None:
    clear(run)
    ask_second_questions(run, pairs=12, trials=["divprune@9"])
    report = build_report(run, further=[second_question_section], draws=50)
    text = report.markdown.read_text()
    assert "## Second question" in text
    assert "| divprune@9 |" in text
    clear(run)
    text = build_report(run, further=[second_question_section], draws=50).markdown.read_text()
    assert "## Second question" not in text


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokprune.cli import app

    clear(run)
    with pytest.raises(SystemExit) as stop:
        app(["second-question", str(run), "--pairs", "5", "--trials", "divprune@18"])
    assert stop.value.code == 0
    out = capsys.readouterr().out.replace("\u00a0", " ")
    assert "divprune@18" in out
    assert "too few pairs" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": ["todre@9"]}, "trial 'todre@9' is none that can be asked; run folder"),
        ({"trials": ["none"]}, "trial 'none' is none that can be asked"),
    ],
)
def test_bad_input(run: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask_second_questions(run, **change)


def test_a_benchmark_without_second_questions(run: Path, tmp_path: Path) -> None:
    made = make_run(tmp_path / "fake", count=12)
    info = json.loads((made / "run.json").read_text())
    info["harness"] = {"name": "lmms-eval"}
    (made / "run.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="was asked by lmms-eval"):
        ask_second_questions(made)


def test_intervals_draw_images() -> None:
    """Two pairs of an image are no two independent draws: the interval is as wide as for one."""
    rows = rows_of(60, 15)
    (both,) = measure(rows, draws=2000)
    one = [r for r in rows if r["second"][-1] == "x" or r["first"] == r["second"]]
    (single,) = measure(one, draws=2000)
    widths = [np.diff(own.interval)[0] for own in (both, single)]
    assert widths[0] == pytest.approx(widths[1], rel=0.15)
