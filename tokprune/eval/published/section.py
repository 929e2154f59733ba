"""Published figures beside a run: the rows of the ledger that fit its model and its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokprune.eval.published import BENCHMARKS, MODELS, Row, load_ledger, spread
from tokprune.eval.published.plot import Mark, published_plot
from tokprune.eval.published.reproduce import Comparison, compare, read_figures, show
from tokprune.eval.report.analysis import Analysis
from tokprune.eval.report.document import Block, Figure, Section, Table, Text
from tokprune.eval.report.formatting import NOTHING
from tokprune.eval.report.plots import styled

#: every paper of the ledger
ALL = ("all",)


@dataclass(frozen=True)
class Published:
    """``model``: the ledger's label of the run's model; ``comparisons``: rows of its tasks, run or
    not; ``marks``: those that share an axis with the run's curves; ``notes``: what is missing."""

    model: str
    comparisons: list[Comparison]
    marks: list[Mark]
    notes: list[str] = field(default_factory=list)


def find_published(
    analysis: Analysis, papers: Sequence[str], model: str | None = None
) -> Published:
    """Published rows for a run.

    Args:
        analysis: of the run.
        papers: keys of the ledger, or ``("all",)``.
        model: the ledger's name of its model, where its own name does not tell.

    Raises:
        ValueError: a paper that the ledger does not have, or a file that is not of its schema.
    """
    rows = load_ledger(None if tuple(papers) == ALL else papers)
    figures = read_figures(analysis.data.folder, model)
    mine = [row for row in rows if row.model == figures.model and row.quality]
    here = [row for row in mine if row.benchmark in figures.tasks]
    label = MODELS[figures.model].label if figures.model in MODELS else figures.model
    notes = []
    if not mine:
        notes.append(
            f"the ledger has no row of {label} in {_listed(papers)}; --as says which published "
            "model a folder of another name is"
        )
    elif not here:
        notes.append(f"no published row of {label} in {_listed(papers)} is of a task of this run")
    compared = compare(here, [figures])
    marks = [
        mark for c in compared
        if (mark := _mark(c, figures.tasks[c.row.benchmark][0][0], analysis.data.tokens))
    ]  # fmt: skip
    return Published(label, compared, list(dict.fromkeys(marks)), notes)


def _listed(papers: Sequence[str]) -> str:
    return "any paper" if tuple(papers) == ALL else ", ".join(papers)


def _mark(c: Comparison, task: str, tokens: int) -> Mark | None:
    row = c.row
    metric = BENCHMARKS[row.benchmark].metrics.get(row.metric)
    # the curves show the mean of scores, so only figures that are one can stand beside them
    if row.unit != "%" or metric is None or not metric.mean or not row.plain:
        return None
    at: float | None = row.budget.layer_mean
    if row.method == "none":
        at = tokens
    elif row.budget.kind is None:  # as printed, whatever it counts
        at = row.budget.tokens
    if at is None:
        return None
    return Mark(task, row.paper.key, row.method, float(at), row.value / 100)


def published_section(
    analysis: Analysis, papers: Sequence[str], model: str | None = None
) -> Section:
    """A section of a report with :func:`find_published`'s rows beside the run's figures."""
    published = find_published(analysis, papers, model)
    blocks: list[Block] = []
    plot = styled(published_plot, analysis, published.marks)
    if plot is not None:
        blocks.append(
            Figure(
                plot,
                f"Lines: this run. Hollow markers: figures of papers on {published.model}, at the "
                "mean of tokens over the layers, or at the printed budget where a paper does not "
                "say what it counts. In the table alone: rows that only tell the tokens after the "
                "last cut, ablations, and methods with something else on top. Black line: this run "
                "unpruned.",
            )
        )
    if published.comparisons:
        blocks.append(_table(published))
        blocks += _not_alike([c.row for c in published.comparisons], published.model)
    blocks += [Text(f"{note[0].upper()}{note[1:]}.") for note in published.notes]
    return Section("published", "Published figures", blocks, "Published")


def _table(published: Published) -> Table:
    """Published, ours, gap and tolerance; rows that were not run are there and say so."""
    # one model, so its column says nothing
    columns = [n for n, name in enumerate(show.HEADER) if name != "model"]
    return Table(
        header=[show.HEADER[n] for n in columns],
        rows=[
            [cells[n] or NOTHING for n in columns] for cells in show.table(published.comparisons)
        ],
        title=f"Published and ours, {published.model}",
        note=f"{show.summary(published.comparisons)}. {show.NOTES}",
        words=frozenset(i for i, n in enumerate(columns) if n in show.WORDS),
        strong=frozenset(i for i, c in enumerate(published.comparisons) if c.ours is not None),
    )


def _not_alike(rows: Sequence[Row], model: str) -> list[Block]:
    """Figures of one method at one budget that are known to be measured in different ways: their
    spread, and in what they differ."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.plain:
            key = (row.method, row.budget_text, row.benchmark, row.metric, row.split or "")
            groups.setdefault(key, []).append(row)
    lines = []
    for (method, budget, benchmark, *_), group in groups.items():
        low, high, columns = spread(group)
        if columns:
            ends = [f"{row.value} ({row.paper.key}, {row.table})" for row in (low, high)]
            lines.append([method, budget, BENCHMARKS[benchmark].label, *ends, ", ".join(columns)])
    if not lines:
        return []
    return [
        Table(
            header=["method", "budget", "benchmark", "lowest", "highest", "differ in"],
            rows=lines,
            title=f"Published figures that are not measured alike, {model}",
            note="What differs is what is known of both sides, read in released scripts or "
            "inferred; nothing is said of what a paper leaves open.",
            words=frozenset(range(6)),
        )
    ]
