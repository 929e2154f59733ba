"""Precision and recall of "yes" in a report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fake_run import make_run

from tokprune.eval.report import analyse, build_report, load_run
from tokprune.eval.report.yes_no import yes_no, yes_no_tasks


def written(folder: Path, said: Any) -> Path:
    """A run whose questions of "presence" are yes (two of three) or no; ``said(number, trial)`` is
    what a trial answers to the number-th of them."""
    folder = make_run(folder, count=90, methods=("divprune",), controls=("random",), blind=True)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    number: dict[str, int] = {}
    for row in rows:
        if row["task"] == "presence":
            n = number.setdefault(row["item"], len(number))
            row["answers"] = ["no"] if n % 3 == 0 else ["yes"]
            row["answer"] = row["answers"][0] if row["trial"] == "none" else said(n, row["trial"])
            row["score"] = float(row["answer"].lower() == row["answers"][0])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_by_hand(tmp_path: Path) -> None:
    # ten questions: no, yes, yes, no, yes, yes, no, yes, yes, no
    folder = written(tmp_path / "run", lambda n, _: ("Yes", "no", "yes", "maybe")[n % 4])
    analysis = analyse(load_run(folder), at=64)
    assert yes_no_tasks(analysis.data) == ("presence",)
    point = next(r for r in analysis.results if r.point.name == "divprune @ 64")
    found = yes_no(analysis, point, ["presence"])
    # answers: Yes, no, yes, maybe, Yes, no, yes, maybe, Yes, no
    assert found.n == 10
    assert found.yes == 5 / 10
    assert found.other == 2 / 10
    hits = 3  # of the yes-questions 1, 2, 4, 5, 7 and 8, those numbered 2, 4 and 8
    assert found.precision == pytest.approx(hits / 5)
    assert found.recall == pytest.approx(hits / 6)
    assert found.f1 == pytest.approx(2 * hits / (5 + 6))
    assert found.accuracy == pytest.approx(4 / 10)  # and number 9, no


def test_nothing_said_yes_to(tmp_path: Path) -> None:
    analysis = analyse(load_run(written(tmp_path / "run", lambda *_: "no")), at=64)
    found = yes_no(analysis, analysis.blind[0], ["presence"])
    assert math.isnan(found.precision)
    assert (found.recall, found.yes) == (0, 0)
    unpruned = yes_no(analysis, analysis.unpruned, ["presence"])
    assert (unpruned.precision, unpruned.recall, unpruned.f1) == (1, 1, 1)


def test_the_report_has_it_where_there_is_such_a_task(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", lambda n, _: ("yes", "no")[n % 2])
    assert "### Yes or no, at 64 tokens" in build_report(folder, draws=50).markdown.read_text()
    plain = make_run(tmp_path / "plain", count=30, methods=("divprune",))
    assert "Yes or no" not in build_report(plain, draws=50).markdown.read_text()
