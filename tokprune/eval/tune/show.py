"""The outcome of tuning as tables: in the terminal, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tokprune.eval.report.analysis import Result
from tokprune.eval.report.formatting import (
    NOTHING,
    between,
    milliseconds,
    number,
    percent,
    probability,
    signed,
    with_interval,
)
from tokprune.eval.tune.result import Contest, Tuned

COLUMNS = (
    "budget", "setting", "tokens", "GFLOPs", "ms", "choosing, %", "held out, % (95 %)",
    "gap (95 %)", "+/−", "p",
)  # fmt: skip


def rows(tuned: Tuned) -> Iterator[tuple[str, ...]]:
    """Of every budget the tuned setting, then the published ones; :data:`COLUMNS`."""
    for contest in tuned.contests:
        best, study = contest.finalists.best, contest.finalists.study
        kind = "published, best of all" if best.published else "tuned"
        gap = between_points(contest)
        yield (
            study["text"], f"{kind}: {contest.tuned.point.text}", *_costs(contest.tuned),
            percent(best.accuracy), _accuracy(contest.tuned), *gap,
        )  # fmt: skip
        for result, finalist in zip(contest.rivals, contest.finalists.rivals):
            if result is contest.tuned:
                continue
            yield (
                "", f"published: {result.point.text}", *_costs(result), percent(finalist.accuracy),
                _accuracy(result), "", "", "",
            )  # fmt: skip
    unpruned = tuned.analysis.unpruned
    yield (
        "all", "unpruned", *_costs(unpruned), NOTHING, _accuracy(unpruned), "", "", "",
    )  # fmt: skip


def between_points(contest: Contest) -> tuple[str, str, str]:
    """Gap, flips and p of a contest; dashes where there is none."""
    if contest.gap is None or contest.interval is None or contest.flips is None:
        return NOTHING, NOTHING, NOTHING
    p = math.nan if contest.p is None else contest.p
    return (
        f"{signed(contest.gap)} {between(contest.interval, sign=True)}",
        f"{contest.flips.gained}/{contest.flips.lost}",
        probability(p),
    )


def _costs(result: Result) -> tuple[str, str, str]:
    return (
        number(result.point.measured["tokens_mean"]),
        f"{result.cost('flops') / 1e9:.3g}",
        milliseconds(result.point.seconds()),
    )


def _accuracy(result: Result) -> str:
    text = with_interval(result.accuracy, result.interval)
    return text if result.counts else f"{text} (no result)"


def markdown(tuned: Tuned) -> str:
    """The report."""
    analysis = tuned.analysis
    run = analysis.data.run
    lines = [
        f"# Tuned settings of {run['model']['name']} on {run['benchmark']['name']}",
        "",
        tuned.verdict,
        "",
        f"Reported on {len(analysis.data.items)} questions about {analysis.resampler.groups} "
        f"images ({tuned.how}), none of which tuning saw. Intervals: 95 %, images resampled. "
        "*gap*: in points, on the published setting that is the strongest there; *+/−*: answers "
        "that are correct with the tuned setting alone, and with the published one alone; *p*: "
        "McNemar, the largest over the published settings below it, adjusted for the number of "
        "budgets (Holm).",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'|'.join(['---', '---', *['---:'] * (len(COLUMNS) - 2)])}|",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows(tuned)),
        "",
        "What was tried, on the questions to choose by:",
        "",
        "| budget | published settings that reach it | others tried | answered all questions | "
        "no result | out of reach | repeated |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for contest in tuned.contests:
        s = contest.finalists.study
        lines.append(
            f"| {s['text']} | {s['published']} | {s['tried']} | {s['complete']} | {s['no_result']} "
            f"| {s['unreachable']} | {s['repeated']} |"
        )
    lines += ["", "Settings, for `tokprune.load(…, setting=…)` and `tokprune run --setting`:", ""]
    lines += [
        f"- `{path.relative_to(tuned.folder).as_posix()}`" for path in tuned.settings.values()
    ]
    return "\n".join(lines) + "\n"


def table(tuned: Tuned) -> Any:
    """The same for a terminal (rich)."""
    from rich.table import Table

    found = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        found.add_column(name, overflow="fold", justify="left" if name in COLUMNS[:2] else "right")
    for row in rows(tuned):
        found.add_row(*row)
    return found
