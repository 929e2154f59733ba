"""Write a run folder so that nothing is lost, whenever the process ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokprune.eval.sweep.lock import LOCK_FILE, FolderLock
from tokprune.eval.sweep.results import (
    LATENCY_FILE,
    LMMS,
    METRICS_FILE,
    OVERLAYS,
    ROWS_FILE,
    RUN_FILE,
    scan_lines,
)
from tokprune.files import read_object

_WRITTEN = (RUN_FILE, ROWS_FILE, LATENCY_FILE, METRICS_FILE)


class Store:
    """A run folder that is open for writing; use as a context manager.

    On entry the folder is made and locked, ``rows.jsonl`` is read, and a corrupt last line (what
    a killed process leaves) is cut off with a warning. ``rows``: what it holds.

    Raises:
        OSError: the folder cannot be made or written, or another process holds it.
        ValueError: on entry, a line before the last is corrupt; names file and line.
    """

    def __init__(self, folder: str | Path, fresh: bool = False) -> None:
        self.folder = Path(folder)
        self.rows: list[dict[str, Any]] = []
        self._fresh = fresh
        self._lock = FolderLock(self.folder)
        self._descriptor = -1
        self._size = 0
        self._made = False

    @property
    def rows_path(self) -> Path:
        return self.folder / ROWS_FILE

    def __enter__(self) -> Store:
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"out {self.folder}: is a file; it should be a folder")
        try:
            self._made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_use()
            self._lock.__enter__()
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise type(error)(f"out {self.folder}: cannot be made or written ({error})") from None
        try:
            if self._fresh:
                self._clear()
            self._open_rows()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._lock.__exit__(None, None, None)
        if self._made and not self._size and not (self.folder / RUN_FILE).exists():
            # nothing came of it: leave no trace
            for name in (ROWS_FILE, LOCK_FILE):
                (self.folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _check_use(self) -> None:
        """Refuse to make a run folder out of one that holds other things."""
        there = {path.name for path in self.folder.iterdir()}
        if there and RUN_FILE not in there and not there <= {ROWS_FILE, LOCK_FILE, OVERLAYS}:
            raise OSError(
                f"out {self.folder}: holds other files and no {RUN_FILE}; choose a new folder, or "
                "one that a sweep has made"
            )

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A file of the folder; None where it is missing or not a JSON object."""
        try:
            return read_object(self.folder / name)
        except (OSError, ValueError):
            return None

    def _clear(self) -> None:
        for name in _WRITTEN:
            (self.folder / name).unlink(missing_ok=True)
        for path in (self.folder / OVERLAYS).glob("*.json"):
            path.unlink()
        shutil.rmtree(self.folder / LMMS, ignore_errors=True)

    def _open_rows(self) -> None:
        self.rows, good, broken = scan_lines(self.rows_path)
        self._descriptor = os.open(self.rows_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if broken is not None:
            os.ftruncate(self._descriptor, good)
            os.fsync(self._descriptor)
            warnings.warn(f"{broken}; it is removed and its question asked again", stacklevel=3)
        self._size = good
        _sync_folder(self.folder)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, all or none of them; returns when they are on the disk.

        Raises:
            OSError: they could not be written (a full disk, …); the file is as it was before.
        """
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        data = text.encode(errors="backslashreplace")  # halves of characters, as JSON has them
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.fsync(self._descriptor)
        except BaseException as error:  # also an interruption between two writes
            os.ftruncate(self._descriptor, self._size)
            if isinstance(error, OSError):
                raise _explained(error, self.rows_path) from error
            raise
        self._size += len(data)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Replace a file of the folder at once: readers see the old or the new one.

        Raises:
            OSError: it could not be written; the old one stays.
        """
        path = self.folder / name
        self._atomically(path, lambda: json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def _atomically(self, path: Path, text: Callable[[], str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the process id keeps writers apart that share a file system but not a lock
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        data = text().encode(errors="backslashreplace")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _explained(error, path) from error
        _sync_folder(path.parent)


def _explained(error: OSError, path: Path) -> OSError:
    """The same error, saying what it means for the run."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return OSError(
        f"{path}: {reason[:1].lower()}{reason[1:]}; everything written before is intact: make "
        "room and run the same command again to go on"
    )


def _sync_folder(folder: Path) -> None:
    """Make new names of a folder durable (where the system can)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse
        pass
    finally:
        os.close(descriptor)
