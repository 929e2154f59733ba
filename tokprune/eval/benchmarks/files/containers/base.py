"""What a file of entries can do, and JSON text with errors that name its place."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


class _Stored:
    """An image whose bytes are in the file and have not been read."""

    def __repr__(self) -> str:
        return "an image in the file"


STORED = _Stored()


class Container(ABC):
    """Entries of a file in order. Nothing of them is kept in memory but where they stand.

    ``names_rows``: an image may be given by the index of another row, as in VLMEvalKit's files.
    """

    names_rows = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = self._now()

    def _now(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns

    def check_unchanged(self) -> None:
        """The file is the one that was scanned.

        Raises:
            ValueError: it has been written since.
        """
        if self._now() != self._stamp:
            raise ValueError(f"{self.path}: has changed while it was in use; load it again")

    @abstractmethod
    def scan(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """All entries, each with its place in words (``file, line 3``), remembering where they
        stand; bytes of images may be left out (:data:`STORED`).

        Raises:
            ValueError: something that is no entry; names the place.
        """

    @abstractmethod
    def read(self, rows: Iterable[int], images: bool = False) -> Iterator[dict[str, Any]]:
        """Entries by number, from 0, after a scan. ``images``: with the bytes of images."""


class Spans(Container):
    """A text file whose entries are spans of bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._starts, self._sizes = array("Q"), array("Q")

    def scan(self) -> Iterator[tuple[str, dict[str, Any]]]:
        self._starts, self._sizes = array("Q"), array("Q")
        for where, start, size, entry in self.find():
            self._starts.append(start)
            self._sizes.append(size)
            yield where, entry

    def read(self, rows: Iterable[int], images: bool = False) -> Iterator[dict[str, Any]]:
        self.check_unchanged()
        with self.path.open("rb") as file:
            for row in rows:
                file.seek(self._starts[row])
                yield self.parse(row, file.read(self._sizes[row]))

    @abstractmethod
    def find(self) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
        """Of every entry its place in words, first byte, number of bytes, and columns."""

    @abstractmethod
    def parse(self, row: int, data: bytes) -> dict[str, Any]:
        """The columns of an entry from its bytes."""


def parse_json(data: bytes | str, where: str) -> Any:
    """JSON text as a value.

    Raises:
        ValueError: not UTF-8, not JSON, or nested too deeply; names the place.
    """
    try:
        return json.loads(data.decode("utf-8-sig") if isinstance(data, bytes) else data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid UTF-8 ({error.reason})") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON that is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def as_entry(value: Any, where: str) -> dict[str, Any]:
    """A JSON value that is an entry.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: should be an object with fields such as id, image, question and answer, is "
            f"{short(value)}"
        )
    return value


def short(value: Any) -> str:
    """A value as error texts show it."""
    if value is None:
        return "missing"
    if isinstance(value, (bytes, Mapping, list, tuple)) and len(value) > 20:
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."
