"""Published figures beside a run: the rows of the ledger that fit its model and its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from evals.published import BENCHMARKS, MODELS, load_ledger
from tokprune.report.analysis import Analysis
from tokprune.reproduce import Comparison, compare, read_figures

#: every paper of the ledger
ALL = ("all",)


@dataclass(frozen=True)
class Mark:
    """A published point on the plot of a task: ``tokens`` as the mean over the decoder's layers, or
    as printed where a paper does not say what it counts; ``accuracy`` in [0, 1]."""

    task: str
    paper: str
    method: str
    tokens: float
    accuracy: float


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
    if row.unit != "%" or metric is None or not metric.mean:
        return None
    at: float | None = row.budget.layer_mean
    if row.method == "none":
        at = tokens
    elif row.budget.kind is None:  # as printed, whatever it counts
        at = row.budget.tokens
    if at is None:
        return None
    return Mark(task, row.paper.key, row.method, float(at), row.value / 100)
