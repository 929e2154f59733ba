"""A JSON document that holds a list of entries, read piece by piece.

The list is the document itself, or stands in it under a name (VQAv2's ``questions`` and
``annotations``, TextVQA's and DocVQA's ``data``); or the document is an object whose values are the
entries, by their ids (ScienceQA's ``problems.json``, GQA).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from tokprune.eval.benchmarks.files.containers.base import Spans, as_entry, parse_json

_LISTS = ("questions", "data", "annotations", "problems", "items")
#: an object under a name is an entry where it has one of these
_OF_ENTRY = ("question", "query", "text")
#: the column that gets the name of an entry
NAME = "question_id"
_BLOCK = 1 << 20
#: a mistake this near to the end of what is read so far may be none
_NEAR = 64


class JsonList(Spans):
    def find(self) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
        with self.path.open("rb") as file:
            text = _Text(file, str(self.path))
            first = text.peek()
            if first == "[":
                yield from self._list(text)
            elif first == "{":
                yield from self._object(text)
            elif first:
                raise ValueError(f"{text.where()}: should be a list of questions, or an object")
            if text.peek():
                raise ValueError(f"{text.where()}: not valid JSON (something follows its end)")

    def parse(self, row: int, data: bytes) -> dict[str, Any]:
        where = f"{self.path}, question {row + 1}"
        if not data.startswith(b'"'):
            return as_entry(parse_json(data, where), where)
        ((name, value),) = parse_json(b"{" + data + b"}", where).items()
        return _named(name, as_entry(value, where))

    def _list(self, text: _Text) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
        for _ in text.members("[", "]"):
            where, (start, size, value) = text.where(), text.value()
            yield where, start, size, as_entry(value, where)

    def _object(self, text: _Text) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
        seen: list[str] = []
        row = 0
        for _ in text.members("{", "}"):
            where, (begin, _, name) = text.where(), text.value()
            text.take(":")
            if not isinstance(name, str):
                raise ValueError(f"{where}: not valid JSON (a name should be text)")
            if name in _LISTS and text.peek() == "[":
                if row:
                    raise ValueError(
                        f"{where}: {name!r} is a second list of entries beside {seen!r}; "
                        "questions and answers should be files of their own"
                    )
                for found in self._list(text):
                    row += 1
                    yield found
                seen.append(name)
                continue
            start, size, value = text.value()
            if isinstance(value, dict) and any(column in value for column in _OF_ENTRY):
                yield where, begin, start + size - begin, _named(name, value)
                row += 1
            if len(seen) < 20:
                seen.append(name)
        if not row and not any(name in _LISTS for name in seen):
            raise ValueError(
                f"{self.path}: holds no list of questions; it should be a list, or an object with "
                f"one under {', '.join(map(repr, _LISTS[:3]))}, and has "
                f"{', '.join(map(repr, seen)) or 'nothing'}"
            )


def _named(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    return {NAME: name, **entry}


class _Text:
    """JSON text that is read in blocks, and how far it has been understood."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False
        self._line = 1
        self._byte = 0
        if file.peek(3).startswith(codecs.BOM_UTF8):
            file.read(3)
            self._byte = 3

    def where(self) -> str:
        """The place of what comes next, in words."""
        self.peek()
        return f"{self._name}, line {self._line}"

    def peek(self) -> str:
        """The next letter that is no space; "" at the end."""
        while True:
            here = self._text[self._at : self._at + 1]
            if here and here not in " \t\r\n":
                return here
            if here:
                self._advance(self._at + 1)
            elif self._ended:
                return ""
            else:
                self._more()

    def take(self, letter: str) -> None:
        if self.peek() != letter:
            raise ValueError(
                f"{self.where()}: not valid JSON (expected {letter!r}, found "
                f"{self.peek()!r})" if self.peek() else
                f"{self._name}: not valid JSON (the file ends where {letter!r} is expected)"
            )  # fmt: skip
        self._advance(self._at + 1)

    def members(self, begin: str, end: str) -> Iterator[None]:
        """Stop before every member of a list or an object."""
        self.take(begin)
        if self.peek() != end:
            yield
            while self.peek() == ",":
                self.take(",")
                yield
        self.take(end)

    def value(self) -> tuple[int, int, Any]:
        """The next value, with its first byte and number of bytes."""
        self.peek()
        block = _BLOCK
        while True:
            try:
                value, end = self._scan(self._text, self._at)
                # a number may go on in the next block
                if end < len(self._text) or self._ended:
                    break
            except RecursionError:
                raise ValueError(
                    f"{self.where()}: JSON that is nested too deeply to be read"
                ) from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _NEAR
                if self._ended or not cut:
                    raise ValueError(
                        f"{self._name}, line {self._line + self._lines(error.pos)}: not valid JSON "
                        f"({error.msg})"
                    ) from None
            except ValueError as error:  # a number of too many digits
                raise ValueError(f"{self.where()}: not valid JSON ({error})") from None
            self._more(block)
            block *= 2
        start = self._byte
        self._advance(end)
        return start, self._byte - start, value

    def _lines(self, to: int) -> int:
        return self._text.count("\n", self._at, to)

    def _advance(self, to: int) -> None:
        passed = self._text[self._at : to]
        self._byte += len(passed) if passed.isascii() else len(passed.encode())
        self._line += passed.count("\n")
        self._at = to

    def _more(self, size: int = _BLOCK) -> None:
        data = self._file.read(size)
        try:
            new = self._decode.decode(data, not data)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._name}, after line {self._line}: not valid UTF-8 ({error.reason})"
            ) from None
        self._ended = not data
        self._text, self._at = self._text[self._at :] + new, 0
