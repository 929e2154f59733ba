"""The oracle over budgets: its definition, its chance level, and what the report says of it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tokprune.eval.report import RunData, analyse, build_report, load_run
from tokprune.eval.report.data import Point
from tokprune.eval.report.highlights import highlights
from tokprune.eval.report.oracle import chance, choose, oracle
from tokprune.eval.report.oracle_section import oracle_section
from tokprune.eval.report.oracle_variants import TOGETHER, most_accurate, oracles, together

COUNT = 180
TITLE = "Oracle: the smallest budget that still answers correctly"
EXAMPLE = [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0]]
SETTINGS = settings(max_examples=150, deadline=None)


# ------------------------------------------------------------------------------ definition


def test_worked_example() -> None:
    """Three scales of 1, 9 and 36 tokens; the fourth question is correct at none."""
    found = oracle(EXAMPLE, (1, 9, 36))
    assert (found.n, found.accuracy, found.never) == (5, pytest.approx(0.8), 1)
    assert found.tokens == pytest.approx((1 + 9 + 36 + 1 + 9) / 5) == pytest.approx(11.2)
    assert oracle(EXAMPLE, (1, 9, 36), exclude=True).tokens == pytest.approx(13.75)
    assert found.counts == (1, 2, 1)


def test_order_of_budgets_changes_nothing() -> None:
    turned = oracle(np.array(EXAMPLE)[:, ::-1], (36, 9, 1))
    assert turned.tokens == pytest.approx(11.2)
    assert turned.counts == (1, 2, 1)


def test_tokens_may_be_measured_per_question() -> None:
    """The second question has fewer tokens at the budget that is the larger one for the first."""
    taken = choose([[1, 1], [1, 1]], [[10, 20], [30, 20]])
    assert taken.column.tolist() == [0, 1]
    assert taken.tokens.tolist() == [10, 20]


def test_graded_scores() -> None:
    """Fewest tokens that reach the best score; a question that never scores stays smallest."""
    found = oracle([[0.3, 0.6, 0.6], [0.0, 0.0, 0.0], [0.5, 0.2, 0.1]], (1, 9, 36))
    assert found.accuracy == pytest.approx((0.6 + 0 + 0.5) / 3)
    assert found.tokens == pytest.approx((9 + 1 + 1) / 3)
    assert (found.counts, found.never) == ((1, 1, 0), 1)


def test_missing_answers_cannot_be_taken() -> None:
    nan = np.nan
    taken = choose([[nan, 1, 1], [nan, 0, 0], [nan, nan, nan], [0, nan, 1]], (1, 9, 36))
    assert taken.column.tolist() == [1, 1, -1, 2]
    assert taken.never.tolist() == [False, True, False, False]
    assert np.isnan(taken.score[2])
    found = oracle([[nan, 1, 1], [nan, 0, 0], [nan, nan, nan]], (nan, 9, 36))
    assert (found.n, found.accuracy, found.tokens, found.never) == (2, 0.5, 9, 1)
    empty = oracle(np.full((2, 2), nan), (1, 2))
    assert (empty.n, empty.counts) == (0, (0, 0))
    assert np.isnan([empty.accuracy, empty.tokens]).all()
    assert np.isnan(chance(np.full((2, 2), nan), (1, 2))).all()


_SCORES = arrays.arrays(
    float,
    st.tuples(st.integers(1, 8), st.integers(1, 5)),
    elements=st.sampled_from([0.0, 0.0, 0.4, 1.0, 1.0, float("nan")]),
)


@given(score=_SCORES, data=st.data())
@SETTINGS
def test_against_brute_force(score: np.ndarray, data: st.DataObject) -> None:
    """One question at a time, straight from the definition."""
    tokens = data.draw(arrays.arrays(float, score.shape, elements=st.integers(1, 40).map(float)))
    found, left = oracle(score, tokens), oracle(score, tokens, exclude=True)
    best, cost, solved = [], [], []
    for row, spent in zip(score, tokens):
        options = [(s, t) for s, t in zip(row, spent) if not np.isnan(s)]
        if not options:
            continue
        top = max(s for s, _ in options)
        best.append(top)
        cost.append(min(t for s, t in options if s == top))
        solved.append(top > 0)
    assert (found.n, found.never) == (len(best), solved.count(False))
    assert sum(found.counts) + found.never == found.n
    if best:
        assert found.accuracy == pytest.approx(np.mean(best))
        assert found.tokens == pytest.approx(np.mean(cost))
    if any(solved):
        assert left.tokens == pytest.approx(np.mean(np.array(cost)[solved]))
    else:
        assert np.isnan(left.tokens)


@pytest.mark.parametrize(
    ("correct", "tokens", "message"),
    [
        ([1, 0], [1, 2], r"correct of shape \(2,\) should be \[items, budgets\]"),
        (np.zeros((3, 0)), [], "budgets ≥ 1"),
        ([[1, 2]], [1, 2], "correct goes from 1 to 2; scores should be in 0…1"),
        ([[1, 0]], [1, 2, 3], r"tokens of shape \(3,\) should be \(2,\)"),
        ([[1, 0]], [1, np.nan], "tokens of item 0 at budget 1 are nan"),
        ([[1, 0]], [-1, 2], "tokens of item 0 at budget 0 are -1"),
    ],
)
def test_bad_input_is_named(correct: Any, tokens: Any, message: str) -> None:
    for function in (choose, oracle, chance):
        with pytest.raises(ValueError, match=message):
            function(correct, tokens)


# ------------------------------------------------------------------------------ chance


@given(
    score=arrays.arrays(
        float, st.tuples(st.integers(1, 3), st.integers(1, 3)),
        elements=st.sampled_from([0.0, 0.4, 1.0]),
    )
)  # fmt: skip
@SETTINGS
def test_chance_is_the_mean_over_all_ways_to_hand_out_answers(score: np.ndarray) -> None:
    tokens = np.array([9.0, 1.0, 36.0])[: score.shape[1]]
    ways = itertools.product(*(itertools.permutations(c) for c in score.T))
    every = [oracle(np.array(way).T, tokens) for way in ways]
    accuracy, mean = chance(score, tokens)
    assert accuracy == pytest.approx(np.mean([o.accuracy for o in every]))
    assert mean == pytest.approx(np.mean([o.tokens for o in every]))


def test_chance_of_strata_is_their_mean() -> None:
    score, tokens = np.array(EXAMPLE, float), (1, 9, 36)
    strata = np.array([True, True, True, False, False])
    parts = [(chance(score[strata == s], tokens), (strata == s).mean()) for s in (True, False)]
    expected = sum(np.array(part) * share for part, share in parts)
    assert chance(score, tokens, strata) == pytest.approx(tuple(expected))
    with pytest.raises(ValueError, match=r"strata of shape \(2,\) should be \(5,\)"):
        chance(score, tokens, [0, 1])


def test_independent_budgets_are_at_chance_and_nested_ones_below() -> None:
    rng = np.random.default_rng(0)
    tokens, shares = (16, 64, 144, 576), np.array([0.5, 0.7, 0.8, 0.9])
    coins = rng.random((40_000, 4)) < shares
    found, luck = oracle(coins, tokens), chance(coins, tokens)
    assert luck[0] == pytest.approx(1 - np.prod(1 - coins.mean(0)))
    assert found.accuracy == pytest.approx(luck[0], abs=0.002)
    assert found.tokens == pytest.approx(luck[1], rel=0.02)
    best = coins.mean(0).max()
    assert found.accuracy > best + 0.09  # coins alone gain this much

    nested = rng.random((40_000, 1)) < shares  # what fewer tokens answer correctly, more do as well
    found = oracle(nested, tokens)
    assert found.accuracy == nested[:, 3].mean()
    assert chance(nested, tokens)[0] > found.accuracy + 0.05
    # with the unpruned answers as strata no budget gains anything, so chance gains nothing
    accuracy, mean = chance(nested, tokens, nested[:, 3])
    assert accuracy == pytest.approx(found.accuracy)
    assert mean < found.tokens  # the same questions fail at several budgets


# ------------------------------------------------------------------------------ of a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run.make_run(
        tmp_path_factory.mktemp("run"), count=COUNT, methods=("divprune", "fastv", "todre"),
        blind=True, failed=2, missing=5, seeds=(0, 1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(folder: Path) -> RunData:
    return load_run(folder)


@pytest.fixture(scope="module")
def found(data: RunData) -> dict[str, Any]:
    return {o.variant: o for o in oracles(analyse(data, draws=300))}


def _rows(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    return {(row["trial"], row["item"]): row for row in rows}


def _by_hand(folder: Path, trials: list[str]) -> tuple[float, float, float]:
    """Macro accuracy, tokens and share never correct, from the rows."""
    rows = _rows(folder)
    parts = []
    for task in (t for t in fake_run.TASKS if t not in fake_run.OUTSIDE):
        names = [i for (trial, i), row in rows.items() if trial == "none" and row["task"] == task]
        own = []
        for name in names:
            tried = [rows[trial, name] for trial in trials]
            right = [row["tokens_mean"] for row in tried if row["score"] == 1]
            least = min(row["tokens_mean"] for row in tried)
            own.append((bool(right), min(right, default=least), not right))
        parts.append(np.mean(own, 0))
    accuracy, tokens, never = np.mean(parts, 0)
    return float(accuracy), float(tokens), float(never)


def test_variants_are_counted_right(folder: Path, found: dict[str, Any]) -> None:
    trials = {
        # 5 answers of divprune@64 are missing: it does not compete; fastv reaches 144 alone
        "divprune": ["divprune@16", "divprune@144"],
        "fastv": ["fastv@144"],
        "todre": ["todre@16", "todre@64", "todre@144"],
        "random": ["random@16", "random@64", "random@144"],  # the first seed alone
        "grid": ["grid@16", "grid@64", "grid@144"],
        "pool": ["pool@16", "pool@64", "pool@144"],
    }
    trials[TOGETHER] = [*trials["divprune"], *trials["fastv"], *trials["todre"]]
    assert set(found) == set(trials)  # neither blind nor downsample
    for variant, own in found.items():
        accuracy, tokens, never = _by_hand(folder, [*trials[variant], "none"])
        assert own.accuracy == pytest.approx(accuracy)
        assert own.tokens == pytest.approx(tokens)
        assert own.never == pytest.approx(never)
        assert own.accuracy + own.never == pytest.approx(1)
        assert sum(share for _, share in own.shares) == pytest.approx(own.accuracy)
        assert {b for b, _ in own.shares} == {float(c.partition("@")[2] or 576)
                                              for c in [*trials[variant], "none"]}  # fmt: skip
        assert len(own.trials) == len(trials[variant]) + 1
        assert own.interval[0] <= own.accuracy <= own.interval[1]
        assert own.tokens_interval[0] < own.tokens < own.tokens_interval[1]
        assert own.control == (variant in ("random", "grid", "pool"))


def test_fixed_budgets(data: RunData, found: dict[str, Any]) -> None:
    results = {r.point.name: r for r in analyse(data, draws=300).results}
    for own in found.values():
        assert own.best.accuracy == max(c.accuracy for c in own.trials)
        assert own.gap == pytest.approx(own.accuracy - own.best.accuracy)
        assert own.gap_interval[0] <= own.gap <= own.gap_interval[1]
        assert own.gap >= 0
        assert (own.equal is None) == (own.gap > 1e-9)
        fits = [c for c in own.trials if results[c.result.point.name].drop_interval[0] <= 0]
        assert own.enough.tokens == min(c.tokens for c in fits)
        assert own.tokens <= own.trials[-1].tokens == fake_run.N
        for c in own.trials:
            if len(c.result.point.seeds) == 1:
                assert c.accuracy == pytest.approx(c.result.accuracy)


def test_more_budgets_never_do_worse(found: dict[str, Any]) -> None:
    every = found[TOGETHER]
    for own in found.values():
        if not own.control:
            assert every.accuracy >= own.accuracy
            assert every.never <= own.never
    assert together(list(found.values())) is every
    methods = [found[m] for m in ("divprune", "fastv", "todre")]
    top = most_accurate(list(found.values()))
    assert top in methods
    assert top.accuracy == max(o.accuracy for o in methods)


def test_failed_questions_are_wrong_whatever_they_took(folder: Path, data: RunData) -> None:
    """A failed row has tokens of its own in the file; they are unknown to the report."""
    point = next(p for p in data.points if p.name == "divprune @ 16")
    assert np.isnan(point.spent).sum() == 2
    failed = {i for (trial, i), row in _rows(folder).items() if row["status"] == "failed"}
    where = np.array([item.id in failed for item in data.items])
    assert np.isnan(point.spent[where]).all()
    assert (point.first[where] == 0).all()
    assert (point.spent[~where] == 16).all()


def test_budget_stands_for_tokens_that_no_answer_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Point, "engaged", True)  # such a point is no result, and would not count
    made = fake_run.make_run(tmp_path, methods=("todre",), controls=(), failed=90)
    (own,) = oracles(analyse(load_run(made), draws=20))
    assert [c.tokens for c in own.trials] == [16, 64, 144, 576]
    assert own.trials[0].accuracy == 0
    assert _by_hand(made, ["todre@16", "todre@64", "todre@144", "none"])[1] == own.tokens


def test_chance_of_a_variant(folder: Path, found: dict[str, Any]) -> None:
    """Right unpruned, or else right by luck at one budget or another, per task."""
    rows, trials = _rows(folder), ["todre@16", "todre@64", "todre@144"]
    parts = []
    for task in (t for t in fake_run.TASKS if t not in fake_run.OUTSIDE):
        plain = {i: row["score"] for (c, i), row in rows.items()
                 if c == "none" and row["task"] == task}  # fmt: skip
        wrong = [i for i, score in plain.items() if score == 0]
        gained = [np.mean([rows[c, i]["score"] for i in wrong]) if wrong else 0.0 for c in trials]
        share = len(wrong) / len(plain)
        parts.append(1 - share + share * (1 - np.prod(1 - np.array(gained))))
    assert found["todre"].chance == pytest.approx(np.mean(parts))
    assert found["todre"].chance > found["todre"].best.accuracy


def test_enough_is_what_cannot_be_told_from_unpruned(tmp_path: Path) -> None:
    made = fake_run.make_run(tmp_path, methods=("todre",), budgets=(16, 288))
    analysis = analyse(load_run(made), draws=300)
    low, high = next(r for r in analysis.results if r.point.name == "todre @ 288").drop_interval
    assert low < 0 < high
    own = next(o for o in oracles(analysis) if o.variant == "todre")
    assert own.enough.result.point.name == "todre @ 288"
    assert next(r for r in analysis.results if r.point.name == "todre @ 16").drop_interval[0] > 0


def test_unpruned_without_answers_has_no_oracle(tmp_path: Path) -> None:
    made = fake_run.make_run(tmp_path, methods=("todre",))
    lines = (made / "rows.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[3])["trial"] == "none"
    (made / "rows.jsonl").write_text("".join(lines[:3] + lines[4:]))
    assert oracles(analyse(load_run(made), draws=20)) == []


# ------------------------------------------------------------------------------ pages


def test_section(folder: Path, tmp_path: Path) -> None:
    report = build_report(folder, tmp_path, draws=50)
    page, text = report.html.read_text(), report.markdown.read_text()
    assert '<section id="oracle">' in page
    part = text[text.index(f"## {TITLE}") :]
    part = part[: part.index("\n## ", 5)]
    table = part[part.index("### Oracle and fixed budgets") : part.index("### Oracle by task")]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(report.oracles) == 7
    for row, own in zip(rows, report.oracles, strict=True):
        name, *trials = (trial.strip(" *") for trial in row.strip("|").split("|"))
        assert name == f"{own.variant}{' †' if own.control else ''} ({len(own.trials)})"
        assert trials[0].startswith(f"{100 * own.accuracy:.1f} ")
        assert trials[2].startswith(f"{100 * own.chance:.1f} at ")
        assert trials[3] == f"{100 * own.best.accuracy:.1f} at {own.best.tokens:.0f}"
        assert trials[-1] == f"{100 * own.never:.1f}"
    plot = (tmp_path / "plots" / "oracle.svg").read_text()
    for words in ("16 tokens", "144 tokens", "unpruned only", "never correct", "best fixed budget",
                  *(o.name for o in report.oracles)):  # fmt: skip
        assert f">{words}<" in plot, words
    best = most_accurate(report.oracles)
    assert best is not None
    told = [x for x in highlights(report.analysis, report.differences, report.contest,
                                report.oracles) if x.startswith("Oracle")]  # fmt: skip
    assert len(told) == 1
    assert f"{best.variant} {100 * best.accuracy:.1f} %" in told[0]
    assert told[0] in page.replace("&#39;", "'")


@pytest.mark.parametrize(
    ("changes", "variants"),
    [
        ({"budgets": (64,)}, None),
        ({"methods": (), "controls": ()}, None),
        ({"methods": (), "controls": ("downsample",), "budgets": (16, 64)}, None),
        ({"methods": ("todre",), "controls": ()}, ["todre"]),  # nothing to take together
        ({"methods": (), "controls": ("grid",)}, ["grid"]),
    ],
)
def test_section_is_there_only_with_budgets(
    tmp_path: Path, changes: dict[str, Any], variants: list[str] | None
) -> None:
    report = build_report(fake_run.make_run(tmp_path, **changes), draws=20)
    page = report.html.read_text()
    assert [o.variant for o in report.oracles] == (variants or [])
    assert ('<section id="oracle">' in page) == bool(variants)
    assert bool(re.search(r"<li>Oracle ", page)) == (
        variants == ["todre"]
    )  # no finding of controls
    assert (report.html.parent / "plots" / "oracle.svg").is_file() == bool(variants)
    if not variants:
        assert oracle_section(report.analysis, report.oracles) is None
