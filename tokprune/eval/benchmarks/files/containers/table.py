"""Tables of text with a header, separated by tabs, as VLMEvalKit has them."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from typing import Any

from tokprune.eval.benchmarks.files.containers.base import Spans

#: cells hold images as text; this is the most that csv takes on every system
_LARGEST_CELL = 2**31 - 1
#: lines of one row, beyond which a quotation mark was surely not closed
_MOST_LINES = 10_000


class Table(Spans):
    """Cells in quotation marks may hold tabs and line breaks. Empty cells, and ``nan``, are
    missing."""

    names_rows = True

    def __init__(self, path: Any) -> None:
        super().__init__(path)
        self.columns: list[str] = []

    def find(self) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
        csv.field_size_limit(_LARGEST_CELL)
        with self.path.open("rb") as file:
            lines = _Lines(file, str(self.path))
            reader = self._reader(lines)
            self.columns = []
            while True:
                start, line = lines.bytes, lines.number + 1
                where = f"{self.path}, line {line}"
                lines.first = line
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    raise ValueError(f"{where}: not a row of the table ({error})") from None
                if row is None:
                    return
                if not row or (len(row) == 1 and not row[0].strip()):
                    continue  # a blank line
                if self.columns:
                    yield where, start, lines.bytes - start, self._entry(row, where)
                else:
                    self.columns = self._header(row, where)

    def parse(self, row: int, data: bytes) -> dict[str, Any]:
        text = io.StringIO(data.decode("utf-8"), newline="")
        return self._entry(next(self._reader(text)), f"{self.path}, question {row + 1}")

    def _reader(self, lines: Any) -> Any:
        return csv.reader(lines, delimiter="\t", strict=True)

    def _header(self, row: list[str], where: str) -> list[str]:
        names = [name.strip() for name in row]
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{where}: column {twice!r} stands in the header twice")
        return names

    def _entry(self, row: list[str], where: str) -> dict[str, Any]:
        if len(row) != len(self.columns):
            raise ValueError(
                f"{where}: has {len(row)} cells, and the header {len(self.columns)} columns"
            )
        return {
            name: None if cell.strip().lower() in ("", "nan") else cell
            for name, cell in zip(self.columns, row)
        }


class _Lines:
    """Lines as text, and how many bytes of the file they were."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        self.bytes = self.number = 0
        #: line at which the present row begins
        self.first = 1

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.bytes += len(line)
        self.number += 1
        if self.number - self.first > _MOST_LINES:
            raise ValueError(
                f"{self._name}, line {self.first}: a quotation mark is not closed within "
                f"{_MOST_LINES} lines"
            )
        if self.number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            return str(line, "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._name}, line {self.number}: not valid UTF-8 ({error.reason})"
            ) from None
