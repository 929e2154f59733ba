"""The tables of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tokprune.eval.report.analysis import Analysis, Result
from tokprune.eval.report.compare import Differences
from tokprune.eval.report.document import Table
from tokprune.eval.report.formatting import (
    NOTHING,
    between,
    changes,
    milliseconds,
    number,
    percent,
    probability,
    signed,
    significant,
    with_interval,
)
from tokprune.eval.report.groups import GroupTable, Share
from tokprune.eval.report.yes_no import yes_no, yes_no_tasks

_COSTS = {"tokens": "tokens", "flops": "FLOPs", "latency": "time"}


#: controls, and methods that did not act, are marked in every table
_MARK, _INERT = " †", " ✗"
_MARKED = "† control; ✗ no result."


def _variant(result: Result) -> str:
    if result.point.variant == "none":
        return "unpruned"
    inert = "" if result.point.engaged else _INERT
    return result.point.variant + (_MARK if result.point.control else "") + inert


def _budget(result: Result) -> str:
    """The budget, in parentheses where it is nominal."""
    if result.point.variant == "blind":
        return NOTHING
    text = number(result.point.budget)
    return f"({text})" if result.point.nominal else text


def tokens(result: Result) -> str:
    """Measured tokens, mean per layer."""
    return number(result.point.measured["tokens_mean"])


def _everyone(analysis: Analysis) -> list[Result]:
    variants = [r for results in analysis.series().values() for r in results]
    plain = [r for r in analysis.results if r.point.variant == "none"]
    return [*plain, *analysis.blind, *variants]


def results_table(analysis: Analysis) -> Table:
    """Every point: costs, accuracy, drop, flips, p, loyalty."""
    rows, strong, struck = [], set(), set()
    for n, r in enumerate(_everyone(analysis)):
        lost, gained = changes(r.flips)
        compared = r.flips is not None
        small = compared and analysis.noise_gap is not None and abs(r.drop) <= analysis.noise_gap
        rows.append([
            _variant(r),
            _budget(r),
            tokens(r),
            number(r.point.measured["tokens_last"]),
            significant(r.cost("flops") / 1e9),
            milliseconds(r.cost("latency")),
            with_interval(r.accuracy, r.interval),
            (_change(r) + (" ~" if small else "")) if compared else NOTHING,
            lost,
            gained,
            probability(r.p),
            percent(r.loyalty),
            ", ".join(_COSTS[kind] for kind in r.on) or NOTHING,
            number(r.n) + (f" (of {r.n + r.missing})" if r.missing else ""),
        ])  # fmt: skip
        if r.on:
            strong.add(n)
        if not r.point.engaged:
            struck.add(n)
    return Table(
        header=("variant", "budget", "tokens, mean", "tokens, last", "FLOPs ×10⁹", "time, ms",
                "accuracy, % [95 %]", "change, points [95 %]", "correct → incorrect",
                "incorrect → correct", "p (Holm)", "loyalty, %", "on the frontier of", "answers"),
        rows=rows,
        title="All points",
        note="Accuracy: macro average over the headline tasks. Tokens: per "
        f"{analysis.data.media}, as measured, "
        "mean over decoder layers and after the last pruning. Change: against the unpruned model "
        "on the same questions; ~ no larger than what another batch size or dtype changes. Flips, "
        "exact McNemar p (adjusted for the number of points) and loyalty (same answer as the "
        "unpruned model): questions of the headline tasks. Time: median of one answer. Shaded: "
        "on a frontier. Struck out: no result, since the method did not act (see below). In "
        f"parentheses: a nominal budget that saves no tokens here. {_MARKED}",
        words=frozenset({0, 12}),
        strong=frozenset(strong),
        struck=frozenset(struck),
    )  # fmt: skip


def _change(r: Result) -> str:
    bounds = -r.drop_interval[1], -r.drop_interval[0]
    return f"{signed(-r.drop)} {between(bounds, sign=True)}"


def gate_table(analysis: Analysis) -> Table | None:
    """Whether every method acted, and what was seen of it."""
    judged = [r for r in _everyone(analysis) if r.point.gates]
    if not judged:
        return None
    rows = []
    for r in judged:
        gate = max(r.point.gates, key=lambda own: ("ok", "warn", "fail").index(own.outcome))
        said = {check.name: check.value for check in gate.checks}
        looks = ("kept as planned", "really shorter", "logits moved", "answers moved", "not empty",
                 "not constant")  # fmt: skip
        rows.append([
            _variant(r), _budget(r), {"ok": "yes", "warn": "look", "fail": "NO"}[gate.outcome],
            gate.reason or NOTHING, *(said.get(name) or NOTHING for name in looks),
        ])  # fmt: skip
    return Table(
        header=("variant", "budget", "acted", "what is wrong", "tokens left", "cache shorter",
                "logits moved", "answers changed", "empty", "commonest answer"),
        rows=rows,
        title="Did the methods act?",
        note="Question by question against the unpruned model: the same inputs, as many tokens as "
        "planned, a shorter cache (read from its tensors), first logits that moved by more than "
        "ten times the noise of another batch size, answers that changed, none of them empty, "
        "constant or of NaN. NO: not a result, and counted nowhere.",
        words=frozenset(range(10)),
        struck=frozenset(n for n, r in enumerate(judged) if not r.point.engaged),
        folded=all(gate.outcome == "ok" for r in judged for gate in r.point.gates),
    )  # fmt: skip


def frontier_table(analysis: Analysis) -> Table:
    """Points on a frontier, from the cheapest up."""
    on = sorted((r for r in analysis.results if r.on), key=lambda r: (r.point.tokens, -r.accuracy))
    return Table(
        header=("variant", "budget", "tokens, mean", "FLOPs ×10⁹", "time, ms", "accuracy, % [95 %]",
                "frontier of"),
        rows=[
            [_variant(r), number(r.point.budget), number(r.point.tokens),
             significant(r.cost("flops") / 1e9), milliseconds(r.cost("latency")),
             with_interval(r.accuracy, r.interval), ", ".join(_COSTS[k] for k in r.on)]
            for r in on
        ],
        title="Pareto frontier",
        note="No other point is at least as good in accuracy and cost and better in one of them. "
        "Computed from point estimates: neighbours whose intervals overlap may swap in another "
        "sample. Budgets that are nominal, and points with missing answers, do not compete. "
        + _MARKED,
        words=frozenset({0, 6}),
    )  # fmt: skip


def task_table(
    analysis: Analysis, results: Sequence[Result], title: str, folded: bool = False
) -> Table:
    """Accuracy per task with Wilson intervals and retention."""
    tasks = analysis.data.tasks
    headline = set(analysis.data.headline)
    return Table(
        header=("variant", *(t if t in headline else f"{t} *" for t in tasks)),
        rows=[
            [_variant(r), *(_task_cell(r, t) for t in tasks)] for r in [analysis.unpruned, *results]
        ],
        title=title,
        note="Accuracy in % with its 95 % Wilson interval; in parentheses the share of the "
        "unpruned accuracy that is retained."
        + ("" if headline == set(tasks) else " * not in the headline average."),
        folded=folded,
    )


def _task_cell(r: Result, task: str) -> str:
    result = r.tasks[task]
    text = with_interval(result.accuracy, result.interval)
    return text if r.flips is None or math.isnan(result.retention) else (
        f"{text} ({percent(result.retention, 0)} %)"
    )  # fmt: skip


def harness_metrics(analysis: Analysis, results: Sequence[Result]) -> Table | None:
    """What the harness itself makes of the answers (totals of MME, F1 of POPE, …), first seeds."""
    shown = [analysis.unpruned, *results]
    reported = [analysis.data.metrics.get(r.point.trials[0], {}) for r in shown]
    rows: dict[tuple[str, str], None] = {}
    for metrics in reported:
        for task, values in metrics.items():
            rows |= {(task, name): None for name in values if "stderr" not in name}
    if not rows:
        return None
    return Table(
        header=("task", "metric", *(_variant(r) for r in shown)),
        rows=[
            [task, name, *(_metric(metrics.get(task, {}).get(name)) for metrics in reported)]
            for task, name in rows
        ],
        title=f"The harness's own metrics at {analysis.at:g} tokens",
        note="As lmms-eval reports them, in its units; without intervals.",
        words=frozenset({0, 1}),
    )  # fmt: skip


def _metric(value: float | None) -> str:
    """Shares with four digits, sums of points with one decimal."""
    if value is None:
        return NOTHING
    return significant(value, 4) if abs(value) < 100 else f"{value:.1f}"


def group_averages(analysis: Analysis, results: Sequence[Result]) -> Table:
    """Macro averages per group of tasks."""
    names = list(analysis.data.groups)
    return Table(
        header=("variant", *names, "all headline tasks"),
        rows=[
            [_variant(r), *(with_interval(*r.groups[n]) for n in names),
             with_interval(r.accuracy, r.interval)]
            for r in [analysis.unpruned, *analysis.blind, *results]
        ],
        title="By group of tasks",
        note="Macro averages in % with 95 % cluster-bootstrap intervals (images are drawn, since "
        "questions about one image are not independent). "
        + "; ".join(f"{name}: {', '.join(tasks)}" for name, tasks in analysis.data.groups.items())
        + ".",
    )  # fmt: skip


def yes_no_table(analysis: Analysis, results: Sequence[Result]) -> Table | None:
    """Precision and recall of "yes"; None without a task of yes and no."""
    tasks = yes_no_tasks(analysis.data)
    if not tasks:
        return None
    rows = []
    for r in [analysis.unpruned, *analysis.blind, *results]:
        own = yes_no(analysis, r, tasks)
        rows.append([
            _variant(r),
            *(percent(v) for v in (own.accuracy, own.precision, own.recall, own.f1, own.yes)),
            percent(own.other), number(own.n),
        ])  # fmt: skip
    return Table(
        header=("variant", "accuracy, %", "precision, %", "recall, %", "F1, %", "yes, %",
                "neither, %", "questions"),
        rows=rows,
        title=f"Yes or no, at {analysis.at:g} tokens",
        note="Of the answer “yes”, over all questions of "
        f"{', '.join(tasks)} together, first seeds. An accuracy that stays while “yes” moves hides "
        f"a bias. {_MARKED}",
    )  # fmt: skip


def differences_table(found: Differences) -> Table:
    """Per task, how many pairs of methods differ, and the clearest of them."""
    rows = []
    for task, pairs in found.tasks().items():
        clearest = min(pairs, key=lambda p: (p.p, -p.gap), default=None)
        possible = sum(p.task == task for p in found.pairs)
        rows.append([
            task, f"{len(pairs)} of {possible}",
            NOTHING if clearest is None else f"{clearest.better} over {clearest.worse}",
            NOTHING if clearest is None else signed(clearest.gap),
            NOTHING if clearest is None else probability(clearest.p),
        ])  # fmt: skip
    return Table(
        header=("task", "pairs that differ", "clearest", "gap, points", "p (Holm)"),
        rows=rows,
        title="Pairs of methods per task",
        note="Exact McNemar on paired answers, p adjusted for all pairs and tasks together (Holm); "
        "a pair differs where p < 0.05. McNemar takes questions as independent.",
        words=frozenset({0, 2}),
    )


def wins_table(found: Differences) -> Table:
    """Method against method: on how many tasks is each significantly better?"""
    return Table(
        header=("better on … tasks", *(f"than {variant}" for variant in found.variants)),
        rows=[
            [a, *("" if a == b else str(found.wins(a, b)) for b in found.variants)]
            for a in found.variants
        ],
        title="Method against method",
        note="Row significantly better than column: number of tasks.",
    )


def hard_easy_table(table: GroupTable, model: str) -> Table:
    g = table.groups
    rows = []
    for row in table.rows:
        lost, gained = changes(row.flips)
        r = row.result
        rows.append([
            _variant(r),
            _share(row.hard), lost, gained, probability(row.p), _share(row.easy),
        ])  # fmt: skip
    return Table(
        header=("variant", "A (hard), % [95 %]", "best correct, this incorrect",
                "best incorrect, this correct",
                "p against the best (Holm)", "B (easy), % [95 %]"),
        rows=rows,
        title=f"Budget {g.budget:g} ({100 * g.fraction:.3g} % of the tokens): "
        f"A has {len(g.hard)} questions, B {len(g.easy)}"
        + (f", {len(g.missing)} without a down-sampled answer" if g.missing else ""),
        note=f"Groups from the answers of {model}. Wilson intervals; McNemar inside A. {_MARKED}",
    )  # fmt: skip


def _share(share: Share) -> str:
    text = with_interval(share.accuracy, share.interval)
    return text + (f", {share.missing} missing" if share.missing else "")


def noise_table(analysis: Analysis) -> Table:
    """The unpruned model against itself."""
    rows = []
    for r in analysis.noise:
        lost, gained = changes(r.flips)
        rows.append([
            f"{r.point.dtype}, batch {r.point.batch_size}", with_interval(r.accuracy, r.interval),
            signed(-r.drop), between((-r.drop_interval[1], -r.drop_interval[0]), sign=True),
            lost, gained, percent(1 - r.loyalty), number(r.flips.n if r.flips else math.nan),
        ])  # fmt: skip
    return Table(
        header=("unpruned model with", "accuracy, % [95 %]", "change, points", "[95 %]",
                "correct → incorrect", "incorrect → correct", "other answer, %", "questions"),
        rows=rows,
        title="Noise floor",
    )  # fmt: skip


def seeds_table(analysis: Analysis) -> Table | None:
    """Accuracy of each seed, where there are several."""
    import numpy as np

    from tokprune.eval.report.resampling import macro

    several = [r for r in analysis.results if len(r.point.seeds) > 1]
    if not several:
        return None
    data = analysis.data
    rows = []
    for r in several:
        means = [
            [float(np.nanmean(column[data.in_tasks([t])])) for column in r.point.by_seed.T]
            for t in data.headline
        ]
        accuracies = macro(np.array(means))
        rows.append([
            r.point.name, number(len(accuracies)), ", ".join(percent(float(v)) for v in accuracies),
            percent(float(accuracies.mean())), percent(float(accuracies.std(ddof=1))),
        ])  # fmt: skip
    return Table(
        header=("point", "seeds", "accuracy of each, %", "mean, %", "standard deviation, points"),
        rows=rows,
        title="Seeds",
        note="Accuracies elsewhere are means over the seeds; flips, p and loyalty are those of the "
        "first seed.",
    )


def latency_table(analysis: Analysis) -> Table | None:
    """Parts of the measured time, medians and quartiles."""
    timed = [r for r in _everyone(analysis) if r.point.latency]
    if not timed:
        return None
    parts = ("encoder", "selection", "prefill", "decode_per_token", "total")
    base = analysis.unpruned.cost("latency")
    rows = []
    for r in timed:
        cells = [_timing(r, part) for part in parts]
        rows.append([r.point.name, *cells, significant(base / r.cost("latency"))])
    latency = analysis.data.latency or {}
    how = latency.get("how") or "all points in turns in one process"
    conditions = (
        f"batch {latency.get('batch_size')}, {latency.get('prompt_tokens')} prompt tokens, "
        f"{latency.get('new_tokens')} new tokens"
    )
    return Table(
        header=(
            "point",
            "encoder",
            "selection",
            "prefill",
            "per new token",
            "total",
            "unpruned ÷ this",
        ),
        rows=rows,
        title="Measured time",
        note=f"Milliseconds, median [quartiles], {how}: {conditions}.",
        folded=True,
    )


def _timing(r: Result, part: str) -> str:
    value = (r.point.latency or {}).get(part)
    if not value:
        return NOTHING
    low, high = (milliseconds(value[q]) if q in value else NOTHING for q in ("q1", "q3"))
    return f"{milliseconds(value['median'])} [{low}, {high}]"


def unreachable_table(analysis: Analysis) -> Table | None:
    trials = analysis.data.unreachable
    if not trials:
        return None
    return Table(
        header=("variant", "budget", "why"),
        rows=[[t["variant"], number(t["budget"]), t["reason"] or "unknown"] for t in trials],
        title="Budgets that a variant cannot reach",
        words=frozenset(range(3)),
    )


def failed_table(analysis: Analysis, most: int = 50) -> Table | None:
    errors = analysis.data.errors
    if not errors:
        return None
    more = len(errors) - most
    return Table(
        header=("point", "question", "error"),
        rows=[list(e) for e in errors[:most]],
        title=f"Failed questions ({len(errors)})",
        note="They count as incorrect." + (f" {more} more are in rows.jsonl." if more > 0 else ""),
        words=frozenset(range(3)),
    )


def missing_table(analysis: Analysis) -> Table | None:
    short = [r for r in _everyone(analysis) if r.missing]
    if not short:
        return None
    return Table(
        header=("point", "answered", "missing"),
        rows=[[r.point.name, number(r.n), number(r.missing)] for r in short],
        title="Points with missing answers",
        note="The sweep has not finished them. They are compared on what both variants answered, "
        "and stay off the frontier.",
    )


def options_table(analysis: Analysis) -> Table:
    """The exact configuration behind every point."""
    return Table(
        header=("point", "configuration"),
        rows=[[r.point.name, r.point.text] for r in _everyone(analysis)],
        title="Configurations",
        words=frozenset(range(2)),
        folded=True,
    )
