"""What stands behind a figure: harness, splits, prompts, packing of tiles. The same method at the
same budget differs between tables, because they do not measure the same thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokprune.eval.sweep.schema import check_object

#: read in the repository, inferred (from numbers, or from a default), unknown. "Read" is of the
#: released scripts: a table may come from others.
MARKS = ("r", "i", "u")

#: what a column may say: words, any text (str) or a number (int)
COLUMNS: Mapping[str, tuple[str, ...] | type] = {
    "harness": ("LLaVA scripts", "lmms-eval", "VLMEvalKit", "own scripts"),
    "harness_version": str,
    "next_packing": ("unpad", "2880", "own"),
    "textvqa_ocr": ("yes", "no"),
    "vizwiz_split": ("val", "test"),
    "sqa_split": ("CQM-A", "CQM-I", "img", "all"),
    "mmbench_file": (
        "dev, CN", "dev 20230712", "dev 20230712, CN 20231003", "dev 20231003, CN 20231003",
        "lmms en_dev", "lmms en_dev, cn_dev",
    ),
    "mme": ("P", "C", "P+C"),
    "pope": ("acc, mean of three", "F1, mean of three", "acc, all rows", "F1, all rows"),
    "budget_rule": (
        "door", "door, per tile", "door, total", "after layer k", "mean over layers",
        "share of full", "FLOPs", "content",
    ),
    "pixels_min": int,
    "pixels_max": int,
    "attention": ("eager", "sdpa", "flash"),
    "cache": ("on", "off", "on, earlier layers cut"),
    "own_or_copied_from": str,
}  # fmt: skip

#: columns that concern some benchmarks alone; the metric of a row of MME is its own field
_BENCHMARKS: Mapping[str, tuple[str, ...]] = {
    "textvqa_ocr": ("textvqa",), "vizwiz_split": ("vizwiz_vqa",), "sqa_split": ("scienceqa_img",),
    "mmbench_file": ("mmbench_en", "mmbench_cn"), "mme": (), "pope": ("pope",),
}  # fmt: skip
#: and some models, by how their names begin
_TILED = "llava-next"
_MODELS = {"next_packing": _TILED, "pixels_min": "qwen", "pixels_max": "qwen"}
#: of the paper's own method, not of others in its tables
_OF_METHOD = ("budget_rule", "cache")
#: rules that the kind of a row's budget tells
_RULES = {"input": "door", "last": "after layer k", "mean": "mean over layers"}
#: between values of which it is not known which one made the figure
_OR = " / "


@dataclass(frozen=True)
class Known:
    """A column's value, and how it is known; ``value`` is None where ``mark`` is "u". Of "a / b"
    it is known that it was one of them, or both on different benchmarks."""

    value: str | int | None
    mark: str


Dialect = Mapping[str, Known]


@dataclass(frozen=True)
class Dialects:
    """Of a paper, and where a table has others; None: of a table whose scripts are not the
    paper's, so that nothing of the paper's holds."""

    paper: Dialect
    tables: Mapping[str, Dialect | None]


def read_dialects(content: Any, where: str) -> Dialects:
    """The object ``dialect`` of a file: ``{"paper": {name: [value, mark]}, "tables": {table: …}}``,
    both of which may be left out.

    Raises:
        ValueError: names the column, and says what would be right.
    """
    parts: dict[str, Any] = {"paper": {}, "tables": {}}
    check_object({**parts, **content} if isinstance(content, dict) else content,
                 dict.fromkeys(parts, dict), where)  # fmt: skip
    for name in content:
        if name not in parts:
            raise ValueError(f"{where}: field {name!r} is unknown")
    return Dialects(
        _columns(content.get("paper", {}), f"{where}, paper"),
        {
            table: None if own is None else _columns(own, f"{where}, tables, {table!r}")
            for table, own in content.get("tables", {}).items()
        },
    )


def _columns(content: Any, where: str) -> Dialect:
    check_object(content, {}, where)
    return {name: _known(name, cell, where) for name, cell in content.items()}


def dialect_of(row: Mapping[str, Any], dialects: Dialects, own: bool) -> Dialect:
    """The dialect of a row (as in the file). What the row says itself goes before its table, its
    table before its paper; last is what the kind of its budget tells.

    Args:
        own: whether it is of the paper's own method.
    """
    table = dialects.tables.get(row["table"], {})
    found = {} if table is None else {**dialects.paper, **table}
    if not own:
        found = {name: known for name, known in found.items() if name not in _OF_METHOD}
    cache = {None: None, True: "on", False: "off"}[row["cache"]]
    words = found["cache"].value if "cache" in found else None
    if words is not None and _agree(words, cache):
        cache = None  # the table says it with more words
    split = row["split"] if row["benchmark"] == "vizwiz_vqa" else None
    for name, value in (("harness", row["harness"]), ("cache", cache), ("vizwiz_split", split)):
        if value is not None:
            found[name] = Known(value, "r")
    kind = row["budget"]["kind"]
    if kind in _RULES and row["method"] != "none":
        found.setdefault("budget_rule", Known(_RULES[kind], "i"))
    return found


def _known(name: str, cell: Any, where: str) -> Known:
    if name not in COLUMNS:
        raise ValueError(f"{where}: column {name!r} is unknown; there are {', '.join(COLUMNS)}")
    where = f"{where}, column {name!r}"
    if not isinstance(cell, list) or len(cell) != 2:
        raise ValueError(f"{where}: should be [value, mark], is {cell!r}")
    value, mark = cell
    if mark not in MARKS:
        raise ValueError(f"{where}: the mark should be one of {', '.join(MARKS)}, is {mark!r}")
    if (value is None) != (mark == "u"):
        raise ValueError(f'{where}: null and "u" go together, is {cell!r}')
    wanted = COLUMNS[name]
    if value is None:
        pass
    elif wanted is int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: should be an integer above 0, is {value!r}")
    elif not isinstance(value, str) or not value:
        raise ValueError(f"{where}: should be text, is {value!r}")
    elif isinstance(wanted, tuple):
        for part in value.split(_OR):
            if part not in wanted:
                raise ValueError(f"{where}: should be one of {', '.join(map(repr, wanted))}, "
                                 f"is {part!r}")  # fmt: skip
    return Known(value, mark)


def apart(a: Dialect, b: Dialect, benchmark: str, model: str) -> tuple[str, ...]:
    """Columns that concern a figure, that both sides know (read or inferred), and in which they
    disagree. What one side does not know is no disagreement, nor what it says less precisely
    ("dev" and "dev 20230712")."""
    return tuple(
        name for name in COLUMNS
        if name in a and name in b and _concerns(name, a, b, benchmark, model)
        and not _agree(_of_model(a[name].value, model), _of_model(b[name].value, model))
    )  # fmt: skip


def _of_model(value: str | int | None, model: str) -> str | int | None:
    """Only LLaVA-NeXT has tiles that a budget is divided between."""
    if isinstance(value, str) and value.startswith("door") and not model.startswith(_TILED):
        return "door"
    return value


def _concerns(name: str, a: Dialect, b: Dialect, benchmark: str, model: str) -> bool:
    if name == "own_or_copied_from":  # who ran it does not say how
        return False
    if name == "harness_version":  # of the same harness
        return "harness" in a and "harness" in b and a["harness"].value == b["harness"].value
    # an average is of all benchmarks
    return benchmark in ("average", *_BENCHMARKS.get(name, (benchmark,))) and model.startswith(
        _MODELS.get(name, "")
    )


def _agree(a: str | int | None, b: str | int | None) -> bool:
    if a is None or b is None or a == b:
        return True
    if isinstance(a, int) or isinstance(b, int):
        return False
    return any(_same(x, y) for x in a.split(_OR) for y in b.split(_OR))


def _same(a: str, b: str) -> bool:
    """Part by part, as far as both of them say."""
    return all(
        one == other
        for x, y in zip(a.split(", "), b.split(", "))
        for one, other in zip(x.split(), y.split())
    )


def told(name: str, a: Dialect, b: Dialect) -> str:
    """Both values of a column, for a reader."""
    return f"{name} ({a[name].value}, here {b[name].value})"
