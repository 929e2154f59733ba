"""JSON lines: an object a line, blank lines aside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokprune.eval.benchmarks.files.containers.base import Spans, as_entry, parse_json


class JsonLines(Spans):
    def find(self) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    where = f"{self.path}, line {number}"
                    yield where, start, len(line), as_entry(parse_json(line, where), where)
                start += len(line)

    def parse(self, row: int, data: bytes) -> dict[str, Any]:
        where = f"{self.path}, question {row + 1}"
        return as_entry(parse_json(data, where), where)
