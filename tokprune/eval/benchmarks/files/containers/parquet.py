"""Parquet, as data sets lie on the hub: images are stored in the rows, and read when asked for."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from typing import Any

from tokprune.eval.benchmarks.files.containers.base import STORED, Container

#: rows that are decoded together, without images and with them
_ROWS, _WITH_IMAGES = 1024, 8


class Parquet(Container):
    def __init__(self, path: Any) -> None:
        super().__init__(path)
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise ValueError(
                "parquet needs pyarrow, which is not installed: pip install 'tokprune[sweep]'"
            ) from None
        self._errors: tuple[type[Exception], ...] = (pyarrow.ArrowException, OSError)
        try:
            # buffered: a column is read page by page, not whole
            self._file = parquet.ParquetFile(path, buffer_size=1 << 20)
        except self._errors as error:
            raise self._broken(error) from None
        schema = self._file.schema
        leaves = [schema.column(n) for n in range(len(schema))]
        self._bytes = [n for n, leaf in enumerate(leaves) if _binary(leaf)]
        self._texts = [leaf.path for n, leaf in enumerate(leaves) if n not in self._bytes]
        self._all = [leaf.path for leaf in leaves]
        #: columns of which nothing is left without the bytes
        self._hidden = {self._all[n].split(".")[0] for n in self._bytes} - {
            path.split(".")[0] for path in self._texts
        }
        counts = [
            self._file.metadata.row_group(n).num_rows for n in range(self._file.num_row_groups)
        ]
        #: first row of every group, and the number of all rows
        self._firsts = [sum(counts[:n]) for n in range(len(counts) + 1)]
        self._cursors: dict[bool, _Cursor] = {}

    def scan(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for group, first in enumerate(self._firsts[:-1]):
            for n, entry in enumerate(self.entries(group, images=False), first + 1):
                yield f"{self.path}, row {n}", entry

    def read(self, rows: Iterable[int], images: bool = False) -> Iterator[dict[str, Any]]:
        self.check_unchanged()
        cursor = self._cursors.setdefault(images, _Cursor(self, images))
        for row in rows:
            yield cursor.at(row)

    def entries(self, group: int, images: bool) -> Iterator[dict[str, Any]]:
        """The rows of a group in order."""
        whole = images or not self._all_stored(group)
        for entry in self._rows(group, whole):
            yield entry if images else _without_bytes(entry)

    def first_of(self, row: int) -> tuple[int, int]:
        """The group of a row, and the first row of that group."""
        group = bisect.bisect_right(self._firsts, row) - 1
        return group, self._firsts[group]

    def _all_stored(self, group: int) -> bool:
        """Whether every image of a group is known to be there without reading it."""
        columns = (self._file.metadata.row_group(group).column(n) for n in self._bytes)
        return all(
            c.statistics is not None and c.statistics.has_null_count
            and not c.statistics.null_count for c in columns
        )  # fmt: skip

    def _rows(self, group: int, images: bool) -> Iterator[dict[str, Any]]:
        names = self._all if images else self._texts
        if not names:  # nothing but images
            for _ in range(self._firsts[group + 1] - self._firsts[group]):
                yield dict.fromkeys(self._hidden, STORED)
            return
        try:
            for batch in self._file.iter_batches(
                _WITH_IMAGES if images else _ROWS, row_groups=[group], columns=names
            ):
                for entry in batch.to_pylist():
                    if not images:
                        entry.update(dict.fromkeys(self._hidden, STORED))
                        _mark(entry, self._struct_columns())
                    yield entry
        except self._errors as error:
            raise self._broken(error) from None

    def _struct_columns(self) -> set[str]:
        """Columns that have bytes beside other things."""
        return {self._all[n].split(".")[0] for n in self._bytes} - self._hidden

    def _broken(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path}: not a readable parquet file ({error})")


class _Cursor:
    """Rows by number; the next ones of a group come without starting anew."""

    def __init__(self, file: Parquet, images: bool) -> None:
        self._file, self._images = file, images
        self._group, self._next = -1, 0
        self._last: tuple[int, dict[str, Any]] = -1, {}
        self._rows: Iterator[dict[str, Any]] = iter(())

    def at(self, row: int) -> dict[str, Any]:
        if self._last[0] == row:
            return self._last[1]
        group, first = self._file.first_of(row)
        if group != self._group or row < self._next:
            self._group, self._next = group, first
            self._rows = self._file.entries(group, self._images)
        entry: dict[str, Any] = {}
        while self._next <= row:
            entry = next(self._rows)
            self._next += 1
        self._last = row, entry
        return entry


def _binary(leaf: Any) -> bool:
    return leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type == "NONE"


def _mark(entry: dict[str, Any], columns: set[str]) -> None:
    """Say of images that have lost their bytes that they are stored."""
    for name in columns:
        value = entry.get(name)
        if isinstance(value, list):
            entry[name] = [None if one is None else STORED for one in value]
        elif value is not None:
            entry[name] = STORED


def _without_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: _light(value) for name, value in entry.items()}


def _light(value: Any) -> Any:
    if isinstance(value, bytes):
        return STORED if value else None
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return STORED if value["bytes"] else {**value, "bytes": None}
    if isinstance(value, list) and value and isinstance(value[0], (bytes, dict)):
        return [_light(one) for one in value]
    return value
