"""Which rows of the ledger are meant, and which of them can be run here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokprune.eval.published import (
    BENCHMARKS,
    MODELS,
    Row,
    baseline,
    find_benchmark,
    load_ledger,
    model_key,
)
from tokprune.eval.published.ledger import FOLDER
from tokprune.eval.sweep.budgets import tolerance
from tokprune.words import parse_budget


def select(
    papers: Sequence[str] | None = None,
    *,
    model: str | None = None,
    methods: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    keep: Sequence[str] | None = None,
    ledger: Any = FOLDER,
) -> list[Row]:
    """Rows of the ledger, unpruned ones beside the chosen ones.

    Args:
        papers: keys; None: all.
        model: a model's name, hub name or folder (see :func:`tokprune.eval.published.model_key`).
        methods: names of methods.
        tasks: benchmarks, lmms-eval tasks or labels of papers.
        keep: budgets, as printed ("192", "10 %", "K=2 R=50 %", spaces aside), in tokens, or as a
            share of them ("1/9").
        ledger: folder of the files.

    Raises:
        ValueError: a paper, model or method that no row has, an unknown task, or no row of any of
            the tasks or budgets (says what there is).
    """
    rows = load_ledger(papers, ledger)
    rows = _narrowed(rows, "model", None if model is None else [model_key(model)], _MODEL)
    if tasks is not None:
        wanted = [_task(task) for task in tasks]
        have = {row.benchmark for row in rows}
        # a list of the usual tasks is fine for a paper that lacks some of them
        if not any(name in have for name, _ in wanted):
            raise ValueError(f"no row is of task {', '.join(tasks)}; there are {_listed(have)}")
        rows = [
            row for row in rows
            if any(row.benchmark == name and (split is None or row.split in (None, split))
                   for name, split in wanted)
        ]  # fmt: skip
    chosen = _narrowed(rows, "method", None if methods is None else [m.lower() for m in methods])
    if keep is not None:
        chosen = [row for row in chosen if any(_is_at(row, text) for text in keep)]
        if not chosen:
            printed = {row.budget.printed for row in rows}
            raise ValueError(
                f"no row is at keep {_listed(set(keep))}; there are {_listed(printed)}"
            )
    kept = {row.key for row in chosen}
    kept |= {base.key for row in chosen if (base := baseline(row, rows)) is not None}
    return [row for row in rows if row.key in kept]


_MODEL = "; --as says which published model a folder of another name is"


def _narrowed(
    rows: list[Row], field: str, wanted: Sequence[str] | None, hint: str = ""
) -> list[Row]:
    if wanted is None:
        return rows
    have = {getattr(row, field) for row in rows}
    for value in wanted:
        if value not in have:
            raise ValueError(f"no row is of {field} {value!r}; there are {_listed(have)}{hint}")
    return [row for row in rows if getattr(row, field) in wanted]


def _task(task: str) -> tuple[str, str | None]:
    found = find_benchmark(task)
    if found is None:
        raise ValueError(f"task {task!r} is unknown to the ledger; it has {_listed(BENCHMARKS)}")
    return found[0].name, found[1]


def _budgets(row: Row) -> set[str]:
    texts = {_plain(row.budget.printed)}
    if row.budget.tokens is not None:
        texts.add(f"{row.budget.tokens:g}")
    return texts


def _is_at(row: Row, text: str) -> bool:
    if _plain(text) in _budgets(row):
        return True
    try:
        share = parse_budget(text)
    except ValueError:  # the words of a paper
        return False
    tokens, unpruned = row.budget.tokens, row.budget.unpruned
    if isinstance(share, int) or tokens is None or unpruned is None:
        return False
    return abs(share * unpruned - tokens) <= tolerance(tokens)


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


# ------------------------------------------------------------------------------- what runs


def why_not(row: Row) -> str | None:
    """Why a row cannot be repeated by this version, whatever weights and data there are; None: it
    can."""
    if not row.quality:
        return "a cost, not an answer: see tokprune bench"
    benchmark = BENCHMARKS[row.benchmark]
    if row.benchmark == "average":
        return "an average of several benchmarks: compare its parts"
    if not benchmark.tasks:
        return "benchmark not among those that can be run"
    if row.metric not in benchmark.metrics:
        return f"metric not measured: {row.metric}"
    if row.method != "none":
        from tokprune.methods import available_methods

        if row.method not in available_methods():
            return "method not in this version"
    if not MODELS[row.model].supported:
        return "model not supported by this version"
    if row.method != "none":
        if row.options is None:
            return "exact setting not known"
        try:
            full_options(row)
        except (ValueError, TypeError) as error:
            return f"setting refused: {error}"
    return None


def needs(row: Row) -> str | None:
    """What a row's answers need beyond model and questions, so that it is not run by the way."""
    benchmark = BENCHMARKS[row.benchmark]
    return benchmark.needs.get(benchmark.split_of(row.split) or "")


def full_options(row: Row) -> dict[str, Any]:
    """All options of a row's setting, defaults included, in JSON types.

    Raises:
        ValueError, TypeError: the method does not take them.
    """
    return all_options(row.method, row.options or {})


def all_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method by the names of today, defaults included, in JSON types.

    Raises:
        ValueError, TypeError: the method does not take them.
    """
    from tokprune.eval.sweep.trials import json_options
    from tokprune.methods import make_method
    from tokprune.methods.setting import as_tuples

    return json_options(make_method(method, **as_tuples(options)))
