"""Answers that stand in a file of their own, found by question id or by image and question."""

from __future__ import annotations

import os
from pathlib import Path
from sys import intern
from typing import Any

from tokprune.eval.benchmarks.files.columns import (
    ANSWERS,
    IMAGE_IDS,
    IMAGES,
    QUESTIONS,
    Entry,
    answers_of,
    first_of,
    id_of,
    names_of,
)
from tokprune.eval.benchmarks.files.containers import open_container
from tokprune.eval.benchmarks.files.containers.base import short


class AnswerFile:
    """Annotations such as VQAv2's, TextVQA's, or POPE's beside LLaVA's file of questions.

    Where both files have image and question, these decide; LLaVA numbers its questions otherwise
    than the annotations do. Only otherwise, or where they are not found, the ids do.

    Raises:
        ValueError: not a file of answers; names place and field.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._answers: list[Any] = []
        #: numbers of answers by id, and by hash of image and question
        self._by_id: dict[str, int] = {}
        self._by_question: dict[int, int] = {}
        self._said: list[int] = []
        for where, entry in open_container(self.path, "answers").scan():
            self._add(entry, where)
        if not self._answers:
            raise ValueError(f"answers {self.path}: holds no answer")

    def _add(self, entry: Entry, where: str) -> None:
        answers = answers_of(entry, where)
        if answers is None:
            raise ValueError(
                f"{where}: holds no answer; expected one of {', '.join(ANSWERS)}; found "
                f"{names_of(entry)}"
            )
        _, name = id_of(entry, where)
        number = len(self._answers)
        if len(answers) == 1:  # an option may be given by its number
            column = first_of(entry, ANSWERS)
            value = entry[column] if column else answers[0]
            self._answers.append(value if isinstance(value, int) else intern(answers[0]))
        else:
            self._answers.append(tuple(map(intern, answers)))
        question = _question(entry)
        self._said.append(0 if question is None else hash(question))
        self._remember(self._by_id, name, number)
        self._remember(self._by_question, _key(entry), number)

    def _remember(self, table: dict[Any, int], key: Any, number: int) -> None:
        """Which answers are a question's; -1 where several differ."""
        if key is None:
            return
        before = table.setdefault(key, number)
        if before < 0 or self._answers[before] != self._answers[number]:
            table[key] = -1

    def of(self, entry: Entry, name: str | None, where: str) -> Any:
        """The answers to a question, as a column would hold them.

        Args:
            name: its id.

        Raises:
            ValueError: there are none, or several; names question and file.
        """
        key, question = _key(entry), _question(entry)
        by_question = None if key is None else self._by_question.get(key)
        if by_question is not None and by_question >= 0:
            return self._value(by_question)
        number = None if name is None else self._by_id.get(name)
        if number is None:
            raise ValueError(f"{where}: question {name!r} has no answer in {self.path}")
        if number < 0:
            raise ValueError(
                f"{where}: question {name!r} has several answers that differ in {self.path}"
            )
        if question is not None and self._said[number] not in (0, hash(question)):
            raise ValueError(
                f"{where}: question {name!r} asks {short(question)}, and {self.path} has another "
                "question by that id; it should be the file of these questions' answers"
            )
        return self._value(number)

    def _value(self, number: int) -> Any:
        value = self._answers[number]
        return list(value) if isinstance(value, tuple) else value


def _question(entry: Entry) -> str | None:
    """The first line of a question, which a request for the form of the answer may follow."""
    column = first_of(entry, QUESTIONS)
    value = None if column is None else entry[column]
    return " ".join(value.split("\n")[0].lower().split()) if isinstance(value, str) else None


def _key(entry: Entry) -> int | None:
    """What image and question are, in short."""
    column, question = first_of(entry, (*IMAGES, *IMAGE_IDS)), _question(entry)
    image = None if column is None else entry[column]
    if question is None or isinstance(image, bool) or not isinstance(image, (str, int)):
        return None
    return hash((os.path.splitext(os.path.basename(str(image)))[0], question))
