"""The oracle in the report: a sentence, a plot and its tables."""

from __future__ import annotations

from collections.abc import Sequence

from tokprune.eval.report.analysis import Analysis
from tokprune.eval.report.document import Block, Figure, Section, Table, Text
from tokprune.eval.report.formatting import (
    NOTHING,
    between,
    number,
    percent,
    signed,
    significant,
    with_interval,
)
from tokprune.eval.report.oracle_plot import oracle_plot
from tokprune.eval.report.oracle_variants import (
    TOGETHER,
    Fixed,
    VariantOracle,
    most_accurate,
    together,
)
from tokprune.eval.report.plots import styled

_ABOUT = (
    "The oracle takes for each question the fewest tokens that still answer it correctly: of one "
    "variant's own budgets and the unpruned model, or of all methods' together. It has "
    "seen the answers, so it bounds what choosing a budget per question could reach.",
    "Taking the best of several tries gains even where no question needs a budget of its own. "
    "Chance tells how much: every budget keeps, per task, its accuracy on the questions that the "
    "unpruned model answers correctly and on those that it answers incorrectly, but which of "
    "them these are is drawn at random, independently of the other budgets. An oracle no more "
    "accurate than chance gains no more than as many independent tries; one that takes more tokens "
    "than chance has "
    "budgets that fail on the same questions.",
)


def oracle_section(analysis: Analysis, found: Sequence[VariantOracle]) -> Section | None:
    """None without oracles."""
    plot = styled(oracle_plot, analysis, found)
    if plot is None:
        return None
    caption = (
        "Questions by the smallest budget that still answers them correctly, macro average over "
        "the headline tasks. Coloured altogether: accuracy of the oracle; black tick: accuracy of "
        "the best fixed budget."
    )
    blocks: list[Block] = [
        *map(Text, _ABOUT),
        Figure(plot, caption),
        table(found),
        by_task(analysis, found),
    ]
    return Section(
        "oracle", "Oracle: the smallest budget that still answers correctly", blocks, "Oracle"
    )


def sentence(found: Sequence[VariantOracle]) -> str | None:
    """The oracle among the highlights; None without a method's."""
    oracle = most_accurate(found)
    if oracle is None:
        return None
    text = (
        f"Oracle (per question the smallest budget that still answers correctly, known only "
        f"afterwards): {oracle.variant} {percent(oracle.accuracy)} % on "
        f"{number(oracle.tokens)} tokens, {signed(oracle.gap)} points "
        f"{between(oracle.gap_interval, sign=True)} on its best fixed budget "
        f"({_fixed(oracle.best)} tokens); as many independent tries would give "
        f"{percent(oracle.chance)} %"
    )
    every = together(found)
    if every is not None:
        text += (
            f". All methods together: {percent(every.accuracy)} % on {number(every.tokens)} tokens "
            f"(independent tries: {percent(every.chance)} %)"
        )
    return text + "."


def table(found: Sequence[VariantOracle]) -> Table:
    """Oracle, chance and fixed budgets of each variant."""
    return Table(
        header=("variant (budgets)", "oracle accuracy, % [95 %]", "oracle tokens [95 %]",
                "chance: % at tokens", "best fixed budget: % at tokens",
                "oracle − best fixed, points [95 %]", "fixed, not clearly below unpruned: % at "
                "tokens", "fixed, as accurate: tokens", "never correct, %"),
        rows=[
            [
                f"{o.name} ({len(o.trials)})",
                with_interval(o.accuracy, o.interval),
                f"{_with_range(o)} ({significant(o.solved_tokens)})",
                f"{percent(o.chance)} at {significant(o.chance_tokens)}",
                _fixed(o.best),
                f"{signed(o.gap)} {between(o.gap_interval, sign=True)}",
                _fixed(o.enough),
                NOTHING if o.equal is None else number(o.equal.tokens),
                percent(o.never),
            ]
            for o in found
        ],
        title="Oracle and fixed budgets",
        note="Macro averages over the headline tasks, tokens as measured for each question (mean "
        "over decoder layers). In parentheses after a variant: its budgets, the unpruned model "
        "included. Oracle tokens: questions that no budget answers correctly count at the fewest "
        "tokens; in parentheses without them. "
        "Scores between 0 and 1: the fewest tokens that reach the question's best score. Not "
        "clearly below unpruned: fewest tokens whose 95 % interval of the drop holds 0, which few "
        "questions make easy. Intervals take the best fixed budget as given. Failed questions are "
        "wrong; points with missing answers do not compete; of several seeds the first counts. "
        "The image down-sampled or left out is no budget of the oracle. "
        "† control, in no other variant's oracle.",
        strong=frozenset(n for n, o in enumerate(found) if o.variant == TOGETHER),
    )  # fmt: skip


def by_task(analysis: Analysis, found: Sequence[VariantOracle]) -> Table:
    """Accuracy and tokens of each oracle per task."""
    tasks, headline = analysis.data.tasks, set(analysis.data.headline)
    return Table(
        header=("variant", *(t if t in headline else f"{t} *" for t in tasks)),
        rows=[
            [o.name, *(f"{percent(o.tasks[t].accuracy)} ({significant(o.tasks[t].tokens)})"
                         for t in tasks)]
            for o in found
        ],
        title="Oracle by task",
        note="Accuracy of the oracle in %, in parentheses its mean tokens."
        + ("" if headline == set(tasks) else " * not in the headline average."),
        folded=True,
    )  # fmt: skip


def _fixed(oracle: Fixed) -> str:
    return f"{percent(oracle.accuracy)} at {number(oracle.tokens)}"


def _with_range(oracle: VariantOracle) -> str:
    low, high = oracle.tokens_interval
    return f"{significant(oracle.tokens)} [{significant(low)}, {significant(high)}]"
