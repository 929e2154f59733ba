"""The comparison as a table for a terminal, Markdown or a page, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from tokprune.eval.published import MODELS, Row
from tokprune.eval.published.dialect import told
from tokprune.eval.published.reproduce.comparison import Comparison

HEADER = ("paper", "table", "model", "method", "budget", "benchmark", "published",
          "ours [95 %]", "gap", "tolerance", "within", "retained, %: published", "ours",
          "questions", "note")  # fmt: skip
#: columns that hold words
WORDS = frozenset({0, 1, 2, 3, 4, 5, 14})

NOTES = (
    "Gap: ours minus published, in the unit of the row. Tolerance: twice the binomial standard "
    "error of the published figure on as many questions as were answered (MME: 20 points, twice "
    "what batch size alone moves it); harnesses, prompts and precision differ on top of it. "
    "Retained: share of the unpruned figure beside it, which cancels most of what a harness "
    "shifts; the note names what is known to be measured in other ways. Marks: ‡ from second-hand "
    "notes, § from memory, ¶ computed from published data, ° options are our inference."
)
_MARKS = {"read": "", "second-hand": " ‡", "from memory": " §", "computed": " ¶"}


def table(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Cells of the table, in the order of ``HEADER``."""
    return [_cells(c) for c in comparisons]


def _cells(c: Comparison) -> list[str]:
    row, ours = c.row, c.ours
    digits = decimals(row)
    published, mine = c.retained
    return [
        row.paper.key, row.table, MODELS[row.model].label,
        row.label + (" °" if row.options_from == "inferred" else ""), row.budget.printed,
        label(row), f"{row.value}{_unit(row)}{_MARKS[row.status]}",
        "not run" if ours is None else _ours(c, digits),
        "" if c.gap is None else _signed(c.gap, digits),
        "" if c.tolerance is None else f"{c.tolerance:.{digits}f}",
        "" if c.within is None else "yes" if c.within else "no",
        _share(published) if row.quality and row.method != "none" else "",
        _share(mine) if row.method != "none" else "", "" if ours is None else str(ours.n), note(c),
    ]  # fmt: skip


def label(row: Row) -> str:
    """The benchmark as the paper has it, with the figure where it is not the usual one."""
    usual = row.metric in ("accuracy", "accuracy or F1", "mean of score ÷ unpruned score")
    text = row.benchmark_label if usual else f"{row.benchmark_label}, {row.metric}"
    return f"{text} ({row.split})" if row.split else text


def note(c: Comparison) -> str:
    """Why it was not run, or what to know when comparing."""
    notes = [] if c.ours is None else list(c.ours.notes)
    parts = [c.reason, *notes, c.row.note]
    if c.ours is not None:
        alike = c.row.harness is None or "harness" in c.differs
        parts.append(None if alike else f"published with {c.row.harness}")
        differs = [told(name, c.row.dialect, c.ours.dialect) for name in c.differs]
        parts.append(f"not measured alike: {', '.join(differs)}" if differs else None)
    return "; ".join(part for part in parts if part)


def decimals(row: Row) -> int:
    """Digits after the point that fit a row's unit."""
    return 3 if row.metric == "CIDEr" else 1


def _ours(c: Comparison, digits: int) -> str:
    assert c.ours is not None
    text = f"{c.ours.value:.{digits}f}"
    if c.ours.interval is None:
        return text
    low, high = c.ours.interval
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def _unit(row: Row) -> str:
    return "" if row.unit in ("%", "score", "% of unpruned") else f" {row.unit}"


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _share(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def summary(comparisons: Sequence[Comparison]) -> str:
    """How many rows were run, and how many of them are within their tolerance."""
    run = [c for c in comparisons if c.ours is not None]
    judged = [c for c in run if c.within is not None]
    inside = sum(bool(c.within) for c in judged)
    text = f"{len(comparisons)} published figures, {len(run)} of them run here"
    return f"{text}; {inside} of {len(judged)} within tolerance" if judged else text


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A Markdown document."""
    lines = [
        "# Published and ours", "", f"{summary(comparisons)}.", "", _line(HEADER),
        _line([":---" if n in WORDS else "---:" for n in range(len(HEADER))]),
        *(_line(cells) for cells in table(comparisons)), "", NOTES, "", "## Sources", "",
    ]  # fmt: skip
    seen: dict[tuple[str, str], str] = {}
    for c in comparisons:
        row = c.row
        remark = row.paper.tables.get(row.table)
        seen[row.paper.key, row.table] = (
            f"- **{row.paper.key}, {row.table}**: {row.paper.citation}; {row.source}."
            + (f" {remark}" if remark else "")
        )
    return "\n".join([*lines, *seen.values(), ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def as_json(comparisons: Sequence[Comparison]) -> str:
    """A JSON document."""
    run: Any = [c for c in comparisons if c.ours is not None]
    return json.dumps(
        {
            "schema": 1, "rows": len(comparisons), "run": len(run),
            "within": sum(c.within is True for c in run),
            "outside": sum(c.within is False for c in run),
            "comparisons": [c.to_dict() for c in comparisons],
        },
        indent=1, ensure_ascii=False,
    )  # fmt: skip
