"""The section of a report."""

from __future__ import annotations

import math

from tokprune.eval.report.analysis import Analysis
from tokprune.eval.report.document import Block, Section, Table, Text
from tokprune.eval.report.formatting import NOTHING, between, percent, probability, signed
from tokprune.eval.second_question.measures import Carried, SecondQuestions, read_second_questions

_SAFE = {True: "yes", False: "no", None: "too few pairs"}


def second_question_section(analysis: Analysis) -> Section | None:
    """None where no second questions were asked."""
    found = read_second_questions(analysis.data.folder)
    return None if found is None else _section(found)


def _section(found: SecondQuestions) -> Section:
    after = {
        "none": "on the cache that the image left while the first question was asked, without that "
        "question",
        "own": "after the first question and the unpruned model's answer to it, on the same cache",
    }[found.history]
    blocks: list[Block] = [
        Text(
            f"Two questions about one image: the second is asked {after}. The carry-over is what "
            "it loses beyond what the method costs a question that is asked alone: the price of "
            "tokens that were chosen under another question."
        ),
        table(found),
    ]
    return Section("second-question", "Second question", blocks)


def table(found: SecondQuestions) -> Table:
    """Every trial, the smallest carry-over first."""
    rows = [_cells(own) for own in sorted(found.carried, key=lambda own: own.carry_over)]
    return Table(
        header=("trial", "alone, %", "second, %", "unpruned second, %", "loss alone", "loss second",
                "carry-over, points [95 %]", "correct → incorrect", "incorrect → correct",
                "p (Holm)", "reads the question", "safe", "pairs"),
        rows=rows,
        title="Second question",
        note="Plain averages over ordered pairs. Carry-over: loss of the second less loss alone, "
        "images drawn for its interval. Flips and exact McNemar p: against the unpruned model on "
        "second questions. Reads the question: share of the kept tokens that another question "
        "changes, in the last decoder layer. Safe: the interval ends below one point, on 500 pairs "
        "or more.",
        words=frozenset({0, 11}),
    )  # fmt: skip


def _cells(own: Carried) -> list[str]:
    return [
        own.trial,
        percent(own.alone),
        percent(own.after),
        percent(own.unpruned),
        signed(-own.first_loss),
        signed(-own.second_loss),
        f"{signed(own.carry_over)} {between(own.interval, sign=True)}",
        str(own.flips.lost),
        str(own.flips.gained),
        probability(own.p),
        NOTHING if math.isnan(own.dependence) else f"{own.dependence:.0%}",
        _SAFE[own.safe],
        f"{own.pairs}" + (f" ({own.failed} failed)" if own.failed else ""),
    ]
