"""The names that columns have in the files that people have, and what an entry says by them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tokprune.eval.benchmarks.files.containers.base import short
from tokprune.eval.benchmarks.files.images import listed

Entry = Mapping[str, Any]

IDS = ("id", "question_id", "questionId", "index", "qid")
QUESTIONS = ("question", "text", "query", "prompt")
ANSWERS = ("answers", "answer", "label", "gt_answer", "multiple_choice_answer")
IMAGES = (
    "images", "image", "frames", "image_path", "img_path", "image_file", "image_local_name",
    "imgname", "image_name", "file_name", "decoded_image",
)  # fmt: skip
#: an id from which the name of a file follows
IMAGE_IDS = ("image_id", "imageId", "img_id")
CHOICES = ("choices", "options")
HINTS = ("hint", "context")
CATEGORIES = ("category", "question_type", "type")
_NUMBERED = re.compile(r"(?:image|img)_?(\d+)")
_LETTERED = re.compile(r"([A-Z])|(?:choice|option)_([a-zA-Z])")


def names_of(entry: Iterable[Any]) -> str:
    """The columns of an entry, in words."""
    return ", ".join(map(str, entry)) or "no column"


def missing(value: Any) -> bool:
    """No value: null, or NaN, as tables store it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def first_of(entry: Entry, names: Iterable[str]) -> str | None:
    """The first of some columns that has a value."""
    return next((name for name in names if not missing(entry.get(name))), None)


def numbered_images(entry: Entry) -> list[str]:
    """Columns ``image_1``, ``image_2``, … in their order."""
    found = ((int(m[1]), name) for name in entry if (m := _NUMBERED.fullmatch(name)))
    return [name for _, name in sorted(found)]


def choice_columns(columns: Iterable[str]) -> dict[str, str]:
    """Columns of options by their letter, in order; empty where there are not at least two."""
    found = {(m[1] or m[2]).upper(): name for name in columns if (m := _LETTERED.fullmatch(name))}
    return dict(sorted(found.items())) if {"A", "B"} <= set(found) else {}


def options_of(entry: Entry, where: str) -> dict[str, str]:
    """Texts of the options by their letters, missing ones left out; empty for an open question.

    Raises:
        ValueError: a list of options that holds something else than texts.
    """
    name = first_of(entry, CHOICES)
    if name is not None:
        values = listed(entry[name])
        if not isinstance(values, (list, tuple)) or len(values) > 26:
            raise ValueError(
                f"{where}: field {name!r} should be a list of at most 26 options, is "
                f"{short(values)}"
            )
        cells = {chr(ord("A") + n): value for n, value in enumerate(values)}
    else:
        cells = {letter: entry.get(column) for letter, column in choice_columns(entry).items()}
        name = "A"
    found = {}
    for letter, value in cells.items():
        text = _plain(value)
        if text is None and not missing(value):
            raise ValueError(
                f"{where}: field {name!r}: option {letter} should be text, is {short(value)}"
            )
        if text and text.strip() and text.strip().lower() != "nan":
            found[letter] = text.strip()
    return found


def _plain(value: Any) -> str | None:
    """Text or a finite number as text; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return str(value)


def id_of(entry: Entry, where: str) -> tuple[str | None, str | None]:
    """The column that names the question, and its name; None for none.

    Raises:
        ValueError: it is neither text nor a whole number.
    """
    column = next((name for name in IDS if name in entry), None)
    if column is None:
        return None, None
    value = entry[column]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return column, str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: field {column!r} should be text, is {short(value)}")
    return column, value


def text_of(entry: Entry, column: str, where: str) -> str:
    """Text of a column.

    Raises:
        ValueError: something else, or nothing but spaces.
    """
    value = entry.get(column)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: field {column!r} should be text, is {short(value)}")
    return value


def answers_of(entry: Entry, where: str) -> tuple[str, ...] | None:
    """What the answers' column holds, as texts; None where there is none.

    A list of objects, as in VQAv2's annotations, is the list of their ``answer``.

    Raises:
        ValueError: two such columns, or neither text nor numbers.
    """
    names = [name for name in ANSWERS[:-1] if not missing(entry.get(name))] or [
        name for name in ANSWERS[-1:] if not missing(entry.get(name))
    ]
    if not names:
        return None
    if "answers" in names and "answer" in names:
        raise ValueError(f"{where}: field 'answer' or 'answers' should be given, both are there")
    value = listed(entry[names[0]])
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = [_plain(one.get("answer") if isinstance(one, Mapping) else one) for one in values]
    # people may have said nothing, but not all of them
    if not any(text and text.strip() for text in texts) or any(
        text is None or (not text.strip() and len(texts) < 4) for text in texts
    ):
        raise ValueError(
            f"{where}: field {names[0]!r} should be text or a list of texts, is {short(value)}"
        )
    return tuple(text for text in texts if text is not None)
