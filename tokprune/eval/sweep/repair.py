"""Make a damaged run folder usable again: what cannot be read goes, and a copy of it stays."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tokprune.eval.sweep.lock import FolderLock
from tokprune.eval.sweep.results import (
    LATENCY_FILE,
    METRICS_FILE,
    OVERLAYS,
    ROWS_FILE,
    RUN_FILE,
    Line,
    read_lines,
    read_object,
)
from tokprune.eval.sweep.schema import check_run


@dataclass
class Repaired:
    """What :func:`repair` did."""

    #: rows that are left
    kept: int = 0
    #: lines of rows.jsonl that are gone: (number, why)
    dropped: list[tuple[int, str]] = field(default_factory=list)
    #: other files that are gone, by their path in the folder, and why
    files: dict[str, str] = field(default_factory=dict)
    #: copies of what was there before
    backups: list[Path] = field(default_factory=list)


def repair(folder: str | Path) -> Repaired:
    """Drop from a run folder what cannot be read, so that it can be resumed and reported.

    Rows that are no rows go, and so do both of two rows that answer the same question differently
    (of equal ones the first stays). Times, metrics and overlays that are no JSON objects go as a
    whole. Each file that is changed is kept beside as ``NAME.bak`` (``.bak2``, … where there is
    one). The same sweep then asks the missing questions again, and times again.

    Raises:
        OSError: no such folder, one that a sweep is writing, or a full disk (all is as it was).
        ValueError: run.json, without which rows mean nothing, cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {folder}: no such folder")
    if not (folder / RUN_FILE).is_file():
        raise FileNotFoundError(f"run folder {folder}: holds no {RUN_FILE}; is it a sweep's --out?")
    try:
        check_run(read_object(folder / RUN_FILE), str(folder / RUN_FILE))
    except ValueError as error:
        raise ValueError(
            f"{error}; without it nobody knows what the rows are: choose another --out, or start "
            "over with --fresh"
        ) from None
    done = Repaired()
    with FolderLock(folder):
        _repair_rows(folder / ROWS_FILE, done)
        others = [folder / LATENCY_FILE, folder / METRICS_FILE]
        for path in (*others, *sorted((folder / OVERLAYS).glob("*.json"))):
            if not path.is_file():
                continue
            try:
                read_object(path)
            except ValueError as error:
                done.files[path.relative_to(folder).as_posix()] = str(error)
                done.backups.append(backup := _backup(path))
                os.replace(path, backup)
    return done


def _repair_rows(path: Path, done: Repaired) -> None:
    if not path.is_file():
        return
    lines = read_lines(path)
    kept: list[Line] = []
    said: dict[str, set[str]] = {}
    for line in lines:
        if line.row is not None:
            said.setdefault(line.row["row"], set()).add(repr(sorted(line.row.items())))
    seen: Counter[str] = Counter()
    for line in lines:
        if line.row is None:
            done.dropped.append((line.number, line.reason))
            continue
        name = line.row["row"]
        seen[name] += 1
        if len(said[name]) > 1:
            done.dropped.append((line.number, f"contradicts another row of {line.row['item']}"))
        elif seen[name] > 1:
            done.dropped.append((line.number, f"repeats the row of {line.row['item']}"))
        else:
            kept.append(line)
    done.kept = len(kept)
    if not done.dropped:
        return
    backup, temporary = _backup(path), path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(line.data for line in kept)
            file.flush()
            os.fsync(file.fileno())
        shutil.copy2(path, backup)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        backup.unlink(missing_ok=True)
        raise
    done.backups.append(backup)


def _backup(path: Path) -> Path:
    """A name beside a file that is free."""
    number, found = 1, path.with_name(f"{path.name}.bak")
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}.bak{number}")
    return found
