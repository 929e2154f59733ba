"""The down-sampling control: which questions need more than a smaller image?

After VTC-Bench (arXiv 2510.07143). Of the questions that the unpruned model answers correctly,
group A (hard) are those that it answers incorrectly on the shrunken image, group B (easy) those
that it still answers correctly. A method's accuracy inside A says what it keeps that shrinking
loses. By definition the unpruned model scores 100 % and down-sampling 0 % in A, so A ranks methods
against each other only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokprune.eval.report.analysis import Analysis, Interval, Result
from tokprune.eval.report.data import RunFolderError
from tokprune.eval.report.statistics import CORRECT, Flips, flips, holm, wilson
from tokprune.files import read_object

RULE = (
    "unpruned model correct; A (hard): incorrect on the down-sampled image; B (easy): correct on it"
)


@dataclass(frozen=True)
class Groups:
    """Lists of items for one budget. ``missing``: the unpruned model is correct, but there is no
    answer on the down-sampled image; ``fraction``: budget ÷ visual tokens; ``model``: name and
    hash of the model whose answers made the groups."""

    budget: float
    fraction: float
    hard: tuple[str, ...]
    easy: tuple[str, ...]
    missing: tuple[str, ...]
    model: Mapping[str, Any]
    benchmark: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "rule": RULE,
            "benchmark": dict(self.benchmark),
            "model": dict(self.model),
            "budget": self.budget,
            "fraction": self.fraction,
            "hard": list(self.hard),
            "easy": list(self.easy),
            "missing": list(self.missing),
        }


@dataclass(frozen=True)
class Share:
    """Right answers of a method inside a group: ``n`` answered, ``missing`` unanswered."""

    n: int
    correct: int
    missing: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.n if self.n else math.nan

    @property
    def interval(self) -> Interval:
        return wilson(self.correct, self.n) if self.n else (math.nan, math.nan)


@dataclass(frozen=True)
class InGroups:
    """A method in both groups. ``flips``: inside A, from the best method there to this one;
    ``p``: their McNemar p, adjusted over the methods (Holm); None for the best itself."""

    result: Result
    hard: Share
    easy: Share
    flips: Flips | None = None
    p: float = math.nan


@dataclass(frozen=True)
class GroupTable:
    """All methods at one budget, best in A first."""

    groups: Groups
    rows: list[InGroups] = field(default_factory=list)


def make_groups(analysis: Analysis) -> list[Groups]:
    """Groups of the run itself, one for each budget that down-sampling was run at."""
    data = analysis.data
    base = data.unpruned.first
    ids = np.array([item.id for item in data.items], dtype=object)
    found = []
    for result in analysis.series().get("downsample", []):
        shrunk = result.point.first
        correct = base >= CORRECT  # NaN is not
        found.append(
            Groups(
                budget=result.point.budget,
                fraction=result.point.budget / data.tokens,
                hard=tuple(ids[correct & (shrunk < CORRECT)]),
                easy=tuple(ids[correct & (shrunk >= CORRECT)]),
                missing=tuple(ids[correct & np.isnan(shrunk)]),
                model={k: data.run["model"].get(k) for k in ("name", "hash")},
                benchmark={k: data.run["benchmark"].get(k) for k in ("name", "version", "split")},
            )
        )
    return found


def write_groups(groups: Sequence[Groups], folder: Path) -> list[Path]:
    """One JSON file per budget."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for g in groups:
        files.append(folder / f"budget-{g.budget:g}.json")
        files[-1].write_text(json.dumps(g.to_dict(), indent=1) + "\n", encoding="utf-8")
    return files


def read_groups(folder: str | Path) -> list[Groups]:
    """Groups from files.

    Args:
        folder: of the files, or the report or run folder above it.

    Raises:
        RunFolderError: no such files, or one that does not hold groups.
    """
    path = Path(folder)
    places = (path, path / "groups", path / "report" / "groups")
    files = next((f for f in (sorted(p.glob("budget-*.json")) for p in places) if f), [])
    if not files:
        raise RunFolderError(
            f"{path}: no group files (groups/budget-*.json) in it; run 'tokprune report' on a run "
            "with the variant 'downsample' first"
        )
    return sorted((_read(file) for file in files), key=lambda g: g.budget)


def _read(file: Path) -> Groups:
    try:
        value = read_object(file)
        if value["schema"] != 1:
            raise ValueError(f"schema={value['schema']!r} is unknown; known: 1")
        lists = {k: tuple(map(str, value[k])) for k in ("hard", "easy", "missing")}
        return Groups(
            budget=float(value["budget"]),
            fraction=float(value["fraction"]),
            model=dict(value["model"]),
            benchmark=dict(value["benchmark"]),
            **lists,
        )
    except KeyError as error:
        raise RunFolderError(f"{file}: not a group file (no {error})") from None
    except (ValueError, TypeError) as error:
        raise RunFolderError(f"{file}: not a group file ({error})") from None


def check_groups(groups: Sequence[Groups], analysis: Analysis, folder: str | Path) -> None:
    """Whether groups of another run can be used here.

    Raises:
        RunFolderError: they are of another benchmark or version, or of none of the budgets.
    """
    here = analysis.data.run["benchmark"]
    for g in groups:
        for key in ("name", "version", "split"):
            theirs, ours = g.benchmark.get(key), here.get(key)
            if theirs != ours:
                raise RunFolderError(
                    f"{folder}: groups of benchmark {key} {theirs!r}, but the run is of {ours!r}; "
                    "both runs must ask the same questions"
                )
    if not any(_results_at(analysis, g) for g in groups):
        theirs = ", ".join(f"{100 * g.fraction:.3g} %" for g in groups)
        ours = ", ".join(f"{100 * b / analysis.data.tokens:.3g} %" for b in analysis.budgets)
        raise RunFolderError(
            f"{folder}: groups at {theirs} of the visual tokens, but the run has {ours}"
        )


def group_tables(analysis: Analysis, groups: Sequence[Groups]) -> list[GroupTable]:
    """Accuracy of every variant except down-sampling itself inside both groups, per budget.

    Another model's groups are matched by the fraction of visual tokens.
    """
    number = {item.id: n for n, item in enumerate(analysis.data.items)}
    tables = []
    for g in groups:
        hard, easy = _mask(g.hard, number), _mask(g.easy, number)
        unknown = [sum(i not in number for i in ids) for ids in (g.hard, g.easy)]
        rows = [
            InGroups(
                r,
                _share(r, hard, unknown[0]),
                _share(r, easy, unknown[1]),
            )
            for r in _results_at(analysis, g)
        ]
        rows.sort(key=lambda row: (-_known(row.hard.accuracy), row.result.point.variant))
        tables.append(GroupTable(g, _tested(rows, hard)))
    return tables


def _results_at(analysis: Analysis, groups: Groups) -> list[Result]:
    return [
        r for r in analysis.results
        if r.point.variant not in ("none", "downsample")
        and math.isclose(r.point.budget / analysis.data.tokens, groups.fraction, rel_tol=0.02)
    ]  # fmt: skip


def _tested(rows: list[InGroups], hard: NDArray[np.bool_]) -> list[InGroups]:
    """Each method against the best one, inside A."""
    if not rows:
        return []
    best = rows[0].result.point.first[hard]
    compared = [flips(best, row.result.point.first[hard]) for row in rows[1:]]
    adjusted = holm([f.p for f in compared])
    return rows[:1] + [
        InGroups(row.result, row.hard, row.easy, f, float(p))
        for row, f, p in zip(rows[1:], compared, adjusted)
    ]


def _mask(ids: Sequence[str], number: Mapping[str, int]) -> NDArray[np.bool_]:
    mask = np.zeros(len(number), dtype=bool)
    mask[[number[i] for i in ids if i in number]] = True
    return mask


def _share(result: Result, where: NDArray[np.bool_], unknown: int) -> Share:
    score = result.point.first[where]
    answered = ~np.isnan(score)
    return Share(
        int(answered.sum()),
        int((score[answered] >= CORRECT).sum()),
        int((~answered).sum()) + unknown,
    )


def _known(value: float) -> float:
    return -1.0 if math.isnan(value) else value
