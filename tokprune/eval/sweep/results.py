"""Read a run folder back: what was run, and one row per answered question."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokprune import files
from tokprune.eval.sweep.gate import Gate, gates
from tokprune.eval.sweep.identity import canonical, row_id
from tokprune.eval.sweep.schema import ROW, TRIAL, check_row, check_run, current_names

RUN_FILE, ROWS_FILE, LATENCY_FILE, OVERLAYS = "run.json", "rows.jsonl", "latency.json", "overlays"
#: of sweeps through lmms-eval: its own metrics, and what its processes wrote
METRICS_FILE, LMMS = "metrics.json", "lmms"

#: what a parquet row has of its trial, beside the row's own fields
_OF_TRIAL = ("variant", "method", "control", "budget", "seed", "dtype", "batch_size", "noise")


@dataclass
class Run:
    """A run folder as read.

    ``info``: the object of run.json; ``rows``: valid rows in file order, one per trial and item;
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
    trials: dict[str, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.trials = {trial["trial"]: trial for trial in self.info["trials"]}

    def rows_of(self, trial: str) -> list[dict[str, Any]]:
        """Rows of one trial.

        Raises:
            ValueError: no such trial; lists what there is.
        """
        if trial not in self.trials:
            raise ValueError(
                f"trial {trial!r} is not in {self.folder}; it has {', '.join(self.trials)}"
            )
        return [row for row in self.rows if row["trial"] == trial]

    def overlays(self) -> list[dict[str, Any]]:
        """Kept-token records for the gallery; empty without any."""
        found = []
        for path in sorted((self.folder / OVERLAYS).glob("*.json")):
            record = read_object(path)
            if record.get("trial") in self.trials:
                found.append(record)
        return found

    def metrics(self) -> dict[str, dict[str, dict[str, float]]]:
        """What lmms-eval made of its answers, {trial: {task: {metric: value}}}; empty without."""
        path = self.folder / METRICS_FILE
        return read_object(path) if path.is_file() else {}

    def gates(self) -> dict[str, Gate]:
        """Of every trial whether its method can be seen to have acted
        (:mod:`tokprune.eval.sweep.gate`)."""
        return gates(self.info["trials"], self.rows)

    def to_parquet(self, path: str | Path) -> None:
        """Write the rows as one parquet table, each with what its trial says of variant and budget
        (``options`` and ``evidence`` as JSON text), and the outcome of its gate.

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
        kinds = {**ROW, **{name: TRIAL[name] for name in _OF_TRIAL}, "options": str, "gate": str}
        judged = {name: gate.outcome for name, gate in self.gates().items()}
        schema = pyarrow.schema([(name, _arrow_type(pyarrow, k)) for name, k in kinds.items()])
        table = []
        for row in self.rows:
            trial = self.trials[row["trial"]]
            of_trial = {name: trial[name] for name in _OF_TRIAL}
            texts = {"options": canonical(trial["options"]), "gate": judged.get(row["trial"])}
            if row["evidence"] is not None:
                texts["evidence"] = canonical(row["evidence"])
            table.append({**row, **of_trial, **texts})
        parquet.write_table(pyarrow.Table.from_pylist(table, schema=schema), path)


def _arrow_type(pyarrow: Any, kind: Any) -> Any:
    """The column of a field of :mod:`tokprune.eval.sweep.schema`."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if list in kinds:
        return pyarrow.list_(pyarrow.string())
    if bool in kinds:
        return pyarrow.bool_()
    if float in kinds:
        return pyarrow.float64()
    return pyarrow.int64() if int in kinds else pyarrow.string()


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
    info = read_object(path)
    check_run(info, str(path))
    rows, stale, duplicates = _valid_rows(folder / ROWS_FILE, info)
    latency = folder / LATENCY_FILE
    return Run(
        folder, info, rows, read_object(latency) if latency.is_file() else None, stale, duplicates
    )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a run folder, by the names of today.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else.
    """
    named: dict[str, Any] = current_names(files.read_object(path))
    return named


def _valid_rows(path: Path, info: dict[str, Any]) -> tuple[list[dict[str, Any]], int, int]:
    """Rows of the present trials, how many were stale, how many repeated."""
    trials = {trial["trial"]: trial for trial in info["trials"]}
    found: dict[str, dict[str, Any]] = {}
    stale = duplicates = 0
    scanned, _, broken = scan_lines(path)
    if broken is not None:
        warnings.warn(f"{broken}; it is left out", stacklevel=3)
    for row in scanned:
        trial = trials.get(row["trial"])
        if trial is None or row["row"] != row_id(info, trial, row["item"], row["task"]):
            stale += 1
        elif row["row"] in found:
            duplicates += 1
        else:
            found[row["row"]] = row
    return list(found.values()), stale, duplicates


@dataclass(frozen=True)
class Line:
    """A line of rows.jsonl that is not blank."""

    #: counted from 1
    number: int
    data: bytes
    #: None: it cannot be read, for this reason
    row: dict[str, Any] | None
    reason: str = ""


def read_lines(path: Path) -> list[Line]:
    """Every line of a file of rows, whether or not it can be read; blank ones are none."""
    found = []
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if not data.strip():
                continue
            try:
                if not data.endswith(b"\n"):
                    raise ValueError("cut off in the middle")
                row = current_names(files.parse_json(data))
                if isinstance(row, dict):
                    row.setdefault("evidence", None)  # of a release that did not write it
                check_row(row, "row")
            except ValueError as error:
                found.append(Line(number, data, None, f"corrupt row ({error})"))
            else:
                found.append(Line(number, data, row))
    return found


def scan_lines(path: Path) -> tuple[list[dict[str, Any]], int, str | None]:
    """All rows of a file, the number of bytes that hold them, and what is wrong with its last line
    (None: nothing).

    Raises:
        ValueError: a line before the last is corrupt; names file and line, and what repairs it.
    """
    if not path.exists():
        return [], 0, None
    lines = read_lines(path)
    wrong = [line for line in lines if line.row is None]
    size = path.stat().st_size
    if not wrong:
        return [line.row for line in lines if line.row is not None], size, None
    said = f"{path}, line {wrong[0].number}: {wrong[0].reason}"
    if wrong[0] is not lines[-1]:
        intact = sum(line.row is not None for line in lines)
        raise ValueError(
            f"{said}; {intact} of {len(lines)} rows are intact: 'tokprune repair {path.parent}' "
            "drops the others, and the same sweep then asks their questions again"
        )
    rows = [line.row for line in lines if line.row is not None]
    return rows, size - _from(path, wrong[0]), said


def _from(path: Path, line: Line) -> int:
    """Bytes from the start of a line to the end of the file."""
    with path.open("rb") as file:
        return sum(len(data) for n, data in enumerate(file, 1) if n >= line.number)
