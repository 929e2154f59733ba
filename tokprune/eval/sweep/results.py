"""Read a run folder back: what was run, and one row per answered question."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokprune.eval.sweep.identity import canonical, row_id
from tokprune.eval.sweep.schema import check_row, check_run

RUN_FILE, ROWS_FILE, LATENCY_FILE, OVERLAYS = "run.json", "rows.jsonl", "latency.json", "overlays"
#: of sweeps through lmms-eval: its own metrics, and what its processes wrote
METRICS_FILE, LMMS = "metrics.json", "lmms"

#: what a parquet row tells of its cell, beside the row's own fields
_OF_CELL = ("arm", "method", "control", "budget", "seed", "dtype", "batch_size", "noise")


@dataclass
class Run:
    """A run folder as read.

    ``info``: the object of run.json; ``rows``: valid rows in file order, one per cell and item;
    ``latency``: the object of latency.json, None without one; ``stale``: rows that were left out
    because code, options or benchmark have changed since they were written; ``duplicates``:
    repeated rows that were left out. The fields are described in ``docs/results.md``.
    """

    folder: Path
    info: dict[str, Any]
    rows: list[dict[str, Any]]
    latency: dict[str, Any] | None = None
    stale: int = 0
    duplicates: int = 0
    cells: dict[str, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.cells = {cell["cell"]: cell for cell in self.info["cells"]}

    def rows_of(self, cell: str) -> list[dict[str, Any]]:
        """Rows of one cell.

        Raises:
            ValueError: no such cell; lists what there is.
        """
        if cell not in self.cells:
            raise ValueError(
                f"cell {cell!r} is not in {self.folder}; it has {', '.join(self.cells)}"
            )
        return [row for row in self.rows if row["cell"] == cell]

    def overlays(self) -> list[dict[str, Any]]:
        """Kept-token records for the gallery; empty without any."""
        found = []
        for path in sorted((self.folder / OVERLAYS).glob("*.json")):
            record = _json(path)
            if record.get("cell") in self.cells:
                found.append(record)
        return found

    def metrics(self) -> dict[str, dict[str, dict[str, float]]]:
        """What lmms-eval made of its answers, {cell: {task: {metric: value}}}; empty without."""
        path = self.folder / METRICS_FILE
        return _json(path) if path.is_file() else {}

    def to_parquet(self, path: str | Path) -> None:
        """Write the rows as one parquet table, each with what its cell says of arm and budget
        (``options`` as JSON text).

        Raises:
            ValueError: pyarrow is not installed.
            OSError: the file cannot be written.
        """
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise ValueError(
                "parquet needs pyarrow, which is not installed: pip install 'tokprune[sweep]'"
            ) from None
        table = []
        for row in self.rows:
            cell = self.cells[row["cell"]]
            told = {name: cell[name] for name in _OF_CELL}
            table.append({**row, **told, "options": canonical(cell["options"])})
        parquet.write_table(pyarrow.Table.from_pylist(table, schema=_arrow_schema(pyarrow)), path)


def _arrow_schema(pyarrow: Any) -> Any:
    text, real, whole, truth = (
        pyarrow.string(), pyarrow.float64(), pyarrow.int64(), pyarrow.bool_(),
    )  # fmt: skip
    kinds = {
        "row": text, "cell": text, "item": text, "image": text, "task": text, "question": text,
        "answers": pyarrow.list_(text), "answer": text, "score": real, "status": text,
        "error": text, "tokens_in": whole, "tokens_last": real, "tokens_mean": real,
        "macs": whole, "macs_unpruned": whole, "kv_bytes": whole, "kv_bytes_unpruned": whole,
        "prompt_tokens": whole, "new_tokens": whole, "seconds": real, "time": real, "arm": text,
        "method": text, "control": truth, "budget": real, "seed": whole, "dtype": text,
        "batch_size": whole, "noise": truth, "options": text,
    }  # fmt: skip
    return pyarrow.schema(list(kinds.items()))


def read_run(folder: str | Path) -> Run:
    """Read and check a run folder. Nothing in it is changed, and a sweep may be writing to it.

    A corrupt or half-written last row is left out with a warning. Rows are compared with the
    identity that run.json gives them: what does not belong to the present code, options and
    benchmark is left out and counted.

    Raises:
        OSError: no such folder, no run.json, or unreadable files.
        ValueError: a file is not of this schema (names file, line and field).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {folder}: no such folder")
    path = folder / RUN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"run folder {folder}: holds no {RUN_FILE}; is it a sweep's --out?")
    info = _json(path)
    check_run(info, str(path))
    rows, stale, duplicates = _valid_rows(folder / ROWS_FILE, info)
    latency = folder / LATENCY_FILE
    return Run(folder, info, rows, _json(latency) if latency.is_file() else None, stale, duplicates)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: should be a JSON object, is {type(value).__name__}")
    return value


def _valid_rows(path: Path, info: dict[str, Any]) -> tuple[list[dict[str, Any]], int, int]:
    """Rows of the present cells, how many were stale, how many repeated."""
    cells = {cell["cell"]: cell for cell in info["cells"]}
    found: dict[str, dict[str, Any]] = {}
    stale = duplicates = 0
    scanned, broken = scan_rows(path)
    if broken is not None:
        warnings.warn(f"{broken}; it is left out", stacklevel=3)
    for row in scanned:
        cell = cells.get(row["cell"])
        if cell is None or row["row"] != row_id(info, cell, row["item"], row["task"]):
            stale += 1
        elif row["row"] in found:
            duplicates += 1
        else:
            found[row["row"]] = row
    return list(found.values()), stale, duplicates


def scan_rows(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """All rows of a file, and what is wrong with its last line (None: nothing).

    Raises:
        ValueError: a line before the last is corrupt; names file and line.
    """
    rows, _, broken = scan_lines(path)
    return rows, broken


def scan_lines(path: Path) -> tuple[list[dict[str, Any]], int, str | None]:
    """As :func:`scan_rows`, with the number of bytes that hold the good rows."""
    if not path.exists():
        return [], 0, None
    rows: list[dict[str, Any]] = []
    good = 0
    wrong: tuple[int, str] | None = None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if wrong is not None:
                raise ValueError(f"{path}, line {wrong[0]}: {wrong[1]}; later lines are intact")
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("cut off in the middle")
                row = json.loads(line)
                check_row(row, "row")
            except ValueError as error:  # decoding errors are ValueErrors, too
                wrong = (number, f"corrupt row ({error})")
                continue
            rows.append(row)
            good += len(line)
    return rows, good, None if wrong is None else f"{path}, line {wrong[0]}: {wrong[1]}"
