"""Rows of the ledger, and checks that say which field of which file is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokprune.errors import did_you_mean
from tokprune.eval.published.benchmarks import BENCHMARKS
from tokprune.eval.published.dialect import (
    COLUMNS,
    Dialect,
    Dialects,
    apart,
    dialect_of,
    read_dialects,
)
from tokprune.eval.published.models import MODELS
from tokprune.eval.sweep.schema import check_object
from tokprune.files import read_json

SCHEMA = 1
FOLDER = Path(__file__).parent / "figures"

#: units of answers, and of costs
QUALITY = ("%", "% of unpruned", "score")
COST = (
    "ms", "s", "TFLOPs", "GFLOPs", "GB", "MB", "images/s", "GPU hours", "% of unpruned cost",
    "count", "×",
)  # fmt: skip
#: what a budget counts: tokens that enter the language model (and stay), tokens after the last
#: pruning inside it, the mean over its layers, or tokens that leave a vision encoder
KINDS = ("input", "last", "mean", "encoder")
#: where options come from: the official code, the paper, or a reasoned guess of ours
ORIGINS = ("official", "paper", "inferred")
#: how our sources know a figure
STATUSES = ("read", "second-hand", "from memory", "computed")
POSITIONS = ("compact", "preserve")


@dataclass(frozen=True)
class Paper:
    """Who printed the figures. ``code``: repository@commit that was read; ``tables``: remarks that
    hold for all rows of a table."""

    key: str
    title: str
    arxiv: str | None
    year: int | None
    venue: str | None
    code: str | None
    tables: Mapping[str, str]

    @property
    def citation(self) -> str:
        where = self.venue or (f"arXiv {self.arxiv}" if self.arxiv else "")
        return f"{self.title} ({where})" if where else self.title


@dataclass(frozen=True)
class Budget:
    """How many tokens a figure stands for."""

    #: as the paper has it
    printed: str
    #: visual tokens per image, counted as ``kind`` says
    tokens: float | None = None
    #: without compression
    unpruned: float | None = None
    kind: str | None = None
    #: over the decoder's layers, where known
    mean: float | None = None

    @property
    def layer_mean(self) -> float | None:
        """Mean over the decoder's layers, as far as the budget says it."""
        if self.mean is not None:
            return self.mean
        return self.tokens if self.kind in ("input", "mean") else None


@dataclass(frozen=True)
class Row:
    """One published figure. Fields are described in ``evals/published/README.md``."""

    paper: Paper
    table: str
    source: str
    spec: str
    method: str
    label: str
    options: Mapping[str, Any] | None
    options_from: str | None
    model: str
    benchmark: str
    benchmark_label: str
    split: str | None
    metric: str
    unit: str
    value: float
    sd: float | None
    budget: Budget
    harness: str | None
    cache: bool | None
    positions: str | None
    status: str
    note: str | None
    #: what stands behind the figure, as far as the row, its table and its paper tell
    dialect: Dialect

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two rows share."""
        return (
            self.paper.key, self.table, self.method, self.label, self.model, self.benchmark,
            self.split, self.metric, self.unit, self.budget.printed,
        )  # fmt: skip

    @property
    def quality(self) -> bool:
        """Whether it tells of answers rather than of costs."""
        return self.unit in QUALITY

    @property
    def plain(self) -> bool:
        """Whether it is the method as such: no ablation, and nothing else on top of it."""
        return not self.table.startswith("ablation") and " + " not in self.label

    @property
    def budget_text(self) -> str:
        """The budget as papers print it: tokens, where they print tokens."""
        printed, tokens = self.budget.printed, self.budget.tokens
        return printed if printed.isdigit() or tokens is None else f"{tokens:g}"

    def to_dict(self) -> dict[str, Any]:
        """All fields in JSON types, with the paper's key, title and arXiv id."""
        row = asdict(self)
        row["paper"] = {n: row["paper"][n] for n in ("key", "title", "arxiv")}
        return row


_TEXT = str
_TEXT_OR_NONE = (str, type(None))
_NUMBER = (int, float)
_NUMBER_OR_NONE = (int, float, type(None))

PAPER: dict[str, Any] = {
    "key": _TEXT, "title": _TEXT, "arxiv": _TEXT_OR_NONE, "year": (int, type(None)),
    "venue": _TEXT_OR_NONE, "code": _TEXT_OR_NONE,
}  # fmt: skip
BUDGET: dict[str, Any] = {
    "printed": _TEXT, "tokens": _NUMBER_OR_NONE, "unpruned": _NUMBER_OR_NONE,
    "kind": _TEXT_OR_NONE, "mean": _NUMBER_OR_NONE,
}  # fmt: skip
ROW: dict[str, Any] = {
    "table": _TEXT, "source": _TEXT, "spec": _TEXT, "method": _TEXT, "label": _TEXT,
    "options": (dict, type(None)), "options_from": _TEXT_OR_NONE, "model": _TEXT,
    "benchmark": _TEXT, "benchmark_label": _TEXT, "split": _TEXT_OR_NONE, "metric": _TEXT,
    "unit": _TEXT, "value": _NUMBER, "budget": dict, "harness": _TEXT_OR_NONE,
    "cache": (bool, type(None)), "positions": _TEXT_OR_NONE, "status": _TEXT,
    "note": _TEXT_OR_NONE,
}  # fmt: skip
#: fields that may be left out
_OPTIONAL: dict[str, Any] = {"sd": _NUMBER_OR_NONE}
_FILE = ("schema", "paper", "tables", "rows", "dialect")


def papers(folder: str | Path = FOLDER) -> tuple[str, ...]:
    """Keys of the papers that the ledger has, sorted."""
    return tuple(sorted(path.stem for path in Path(folder).glob("*.json")))


def load_paper(key: str, folder: str | Path = FOLDER) -> list[Row]:
    """All rows of a paper, in the order of its file.

    Raises:
        ValueError: no such paper (names what there is), or a file that is not of the schema (names
            file, row and field).
    """
    known = papers(folder)
    if key not in known:
        hint = did_you_mean(key, known)
        raise ValueError(f"paper {key!r} is not in the ledger; it has {', '.join(known)}.{hint}")
    path = Path(folder) / f"{key}.json"
    return read_paper(read_json(path), path.name)


def load_ledger(keys: Iterable[str] | None = None, folder: str | Path = FOLDER) -> list[Row]:
    """Rows of some papers (None: all).

    Raises:
        ValueError: see :func:`load_paper`.
    """
    return [row for key in (papers(folder) if keys is None else keys)
            for row in load_paper(key, folder)]  # fmt: skip


def read_paper(content: Any, where: str) -> list[Row]:
    """Rows of a file's content.

    Raises:
        ValueError: names row and field, and says what would be right.
    """
    check_object(content, {"schema": int, "paper": dict, "tables": dict, "rows": list}, where)
    _unknown(content, _FILE, where)
    if content["schema"] != SCHEMA:
        raise ValueError(
            f"{where}: schema {content['schema']} cannot be read; this version of tokprune knows "
            f"schema {SCHEMA}"
        )
    about = content["paper"]
    check_object(about, PAPER, f"{where}, paper")
    _unknown(about, PAPER, f"{where}, paper")
    if where.removesuffix(".json") != about["key"]:
        raise ValueError(f"{where}, paper: field 'key' should be the file's name, is "
                         f"{about['key']!r}")  # fmt: skip
    for table, remark in content["tables"].items():
        if not isinstance(remark, str) or not remark:
            raise ValueError(f"{where}, tables: the remark on {table!r} should be text")
    paper = Paper(**about, tables=content["tables"])
    if not content["rows"]:
        raise ValueError(f"{where}: holds no row")
    dialects = read_dialects(content.get("dialect", {}), f"{where}, dialect")
    rows: list[Row] = []
    seen: dict[tuple[Any, ...], int] = {}
    for number, entry in enumerate(content["rows"]):
        row = _row(entry, paper, dialects, f"{where}, rows[{number}]")
        if row.key in seen:
            raise ValueError(f"{where}, rows[{number}]: repeats rows[{seen[row.key]}]")
        seen[row.key] = number
        rows.append(row)
    for name, named in (("tables", content["tables"]), ("dialect, tables", dialects.tables)):
        unused = set(named) - {row.table for row in rows}
        if unused:
            raise ValueError(f"{where}, {name}: no row is of {sorted(unused)[0]!r}")
    return rows


def differing(a: Row, b: Row) -> tuple[str, ...]:
    """Columns of the dialects of two figures that are known of both, and in which they disagree:
    figures that differ in none may be compared."""
    return apart(a.dialect, b.dialect, a.benchmark, a.model)


def spread(rows: Sequence[Row]) -> tuple[Row, Row, tuple[str, ...]]:
    """The lowest and the highest of rows of one kind, and in which columns any two of them
    differ."""
    ordered = sorted(rows, key=lambda row: row.value)
    found = {name for i, a in enumerate(rows) for b in rows[:i] for name in differing(a, b)}
    return ordered[0], ordered[-1], tuple(name for name in COLUMNS if name in found)


def baseline(row: Row, rows: Iterable[Row]) -> Row | None:
    """The unpruned figure beside ``row``: same paper, table, model, benchmark and metric."""
    wanted = _beside(row)
    return next((o for o in rows if o.method == "none" and _beside(o) == wanted), None)


def _beside(row: Row) -> tuple[Any, ...]:
    return (
        row.paper.key, row.table, row.model, row.benchmark, row.split, row.metric, row.unit
    )  # fmt: skip


def _row(entry: Any, paper: Paper, dialects: Dialects, where: str) -> Row:
    check_object(entry, ROW, where)
    check_object({**dict.fromkeys(_OPTIONAL), **entry}, _OPTIONAL, where)
    _unknown(entry, {**ROW, **_OPTIONAL}, where)
    for name, kind in ROW.items():
        if (kind is _TEXT or kind == _TEXT_OR_NONE) and entry[name] == "":
            raise ValueError(f"{where}: field {name!r} is empty; leave it null where unknown")
    _choice(entry, "model", MODELS, where)
    _choice(entry, "benchmark", BENCHMARKS, where)
    _choice(entry, "unit", (*QUALITY, *COST), where)
    _choice(entry, "status", STATUSES, where)
    for name, known in (("options_from", ORIGINS), ("positions", POSITIONS)):
        if entry[name] is not None:
            _choice(entry, name, known, where)
    if (entry["options"] is None) != (entry["options_from"] is None):
        raise ValueError(f"{where}: fields 'options' and 'options_from' go together")
    _value(entry, where)
    splits = {*BENCHMARKS[entry["benchmark"]].tasks, *BENCHMARKS[entry["benchmark"]].questions}
    if entry["split"] is not None and splits:
        _choice(entry, "split", sorted(splits), where)
    budget = _budget(entry, where)
    dialect = dialect_of(entry, dialects, own=entry["method"] == paper.key)
    return Row(paper=paper, **{"sd": None, **entry, "budget": budget, "dialect": dialect})


def _value(entry: Mapping[str, Any], where: str) -> None:
    value, unit = entry["value"], entry["unit"]
    top = {"%": 100.0, "% of unpruned": 120.0}.get(unit, math.inf)
    if not (math.isfinite(value) and 0 <= value <= top):
        bound = "at least 0" if top == math.inf else f"from 0 to {top:g}"
        raise ValueError(f"{where}: field 'value' in {unit!r} should be {bound}, is {value!r}")


def _budget(entry: Mapping[str, Any], where: str) -> Budget:
    # ledgers of the release before say "asked"
    budget = {"printed" if name == "asked" else name: v for name, v in entry["budget"].items()}
    where = f"{where}, budget"
    check_object(budget, BUDGET, where)
    _unknown(budget, BUDGET, where)
    if budget["kind"] is not None:
        _choice(budget, "kind", KINDS, where)
    for name in ("tokens", "unpruned", "mean"):
        if budget[name] is not None and not budget[name] > 0:
            raise ValueError(f"{where}: field {name!r} should be above 0, is {budget[name]!r}")
    for name in ("tokens", "mean"):
        if budget[name] is not None and budget[name] > (budget["unpruned"] or math.inf):
            raise ValueError(
                f"{where}: field {name!r} is {budget[name]!r}, more than the "
                f"{budget['unpruned']!r} tokens without compression"
            )
    if entry["method"] == "none" and budget["tokens"] != budget["unpruned"]:
        raise ValueError(
            f"{where}: the unpruned model has all its tokens, not {budget['tokens']!r}"
        )
    return Budget(**budget)


def _unknown(value: Mapping[str, Any], fields: Iterable[str], where: str) -> None:
    for name in value:
        if name not in fields:
            raise ValueError(f"{where}: field {name!r} is unknown")


def _choice(entry: Mapping[str, Any], name: str, known: Iterable[str], where: str) -> None:
    if entry[name] not in known:
        raise ValueError(
            f"{where}: field {name!r} should be one of {', '.join(known)}, is {entry[name]!r}"
        )
