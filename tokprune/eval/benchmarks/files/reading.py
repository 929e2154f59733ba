"""One entry of a file as a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokprune.eval.benchmarks.files.answers import AnswerFile
from tokprune.eval.benchmarks.files.columns import (
    ANSWERS,
    CATEGORIES,
    HINTS,
    IMAGE_IDS,
    IMAGES,
    QUESTIONS,
    Entry,
    answers_of,
    first_of,
    id_of,
    missing,
    names_of,
    numbered_images,
    options_of,
    text_of,
)
from tokprune.eval.benchmarks.files.containers.base import short
from tokprune.eval.benchmarks.files.images import Image, ImageFolder, listed, resolve
from tokprune.eval.benchmarks.files.prompts import multiple_choice, option_meant, placed
from tokprune.eval.benchmarks.files.shapes import Shape

_TASK = "all"


@dataclass(frozen=True)
class Question:
    """An entry as it will be asked; ``id`` None: the number of its row. ``images``: as
    :func:`tokprune.eval.benchmarks.files.images.resolve` gives them."""

    id: str | None
    #: column of the id
    named_by: str | None
    text: str
    images: list[Image]
    video: bool
    answers: tuple[str, ...]
    task: str
    image_id: str | None
    meta: dict[str, Any]


class NoAnswersError(ValueError):
    """A question without an answer."""


class NoImageError(ValueError):
    """A question without an image."""


@dataclass(frozen=True)
class Reader:
    """Turns entries into questions. ``suffix``: text added to every question."""

    shape: Shape
    folder: ImageFolder
    answer_file: AnswerFile | None
    #: whether text may name another row, which has the image
    names_rows: Callable[[str], bool] | None
    suffix: str

    def question(self, entry: Entry, where: str) -> Question:
        """An entry as a question.

        Raises:
            NoAnswersError, NoImageError: it has none.
            ValueError, OSError: something else is wrong; names place and field.
        """
        named_by, name = id_of(entry, where)
        column = first_of(entry, QUESTIONS) or QUESTIONS[0]
        text = text_of(entry, column, where)
        options = options_of(entry, where) if self.shape.choices else {}
        answers = self._answers(entry, name, options, where)
        task, image_id = self._task(entry, where), _image_id(entry)
        try:
            "".join((name or "", text, *answers, task, image_id or "")).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: holds half of a letter (a lone surrogate)") from None
        images, video = self.images(entry, where)
        hint = first_of(entry, HINTS) if self.shape.choices else None
        if hint is not None and (options or self.shape.hint) and str(entry[hint]).strip():
            text = multiple_choice(text, options, self.shape.hint + text_of(entry, hint, where))
        elif options:
            text = multiple_choice(text, options)
        if not video:
            text, images = placed(text, images, where)
        meta = _meta(entry, where)
        if options:
            meta["options"] = options
        if self.shape.name != "tokprune":
            for names, key in ((CATEGORIES, "category"), (("dataset", "dataset_name"), "dataset")):
                if (known := first_of(entry, names)) and isinstance(entry[known], str):
                    meta.setdefault(key, entry[known])
        return Question(
            name, named_by, text + self.suffix, images, video, answers,
            task, image_id, meta,
        )  # fmt: skip

    def _answers(
        self, entry: Entry, name: str | None, options: Mapping[str, str], where: str
    ) -> tuple[str, ...]:
        if self.answer_file is not None:
            value = self.answer_file.of(entry, name, where)
            entry = {"answer": value}
        elif (index := entry.get("correct_choice_idx")) is not None and options:
            entry = {"answer": index}
        answers = answers_of(entry, where)
        if answers is None:
            raise NoAnswersError(
                f"{where}: field 'answer' or 'answers' should be given, neither is there"
            )
        if not options:
            return answers
        column = first_of(entry, ANSWERS)
        value = listed(entry[column]) if column else None
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(option_meant(one, options, where) for one in values)

    def _task(self, entry: Entry, where: str) -> str:
        column = self.shape.task
        return _TASK if column is None or missing(entry.get(column)) else (
            text_of(entry, column, where)
        )  # fmt: skip

    def images(self, entry: Entry, where: str) -> tuple[list[Image], bool]:
        """What a question shows, and whether that is a video.

        Raises:
            NoImageError: nothing.
            ValueError, OSError: something that is no image, or not there.
        """
        given = [name for name in ("image", "images", "frames") if not missing(entry.get(name))]
        if "frames" in given and len(given) > 1:
            raise ValueError(f"{where}: field 'image' or 'frames' should be given, both are there")
        column = first_of(entry, IMAGES)
        if column is not None:
            return self._listed(entry, column, where)
        numbered = [name for name in numbered_images(entry) if not missing(entry[name])]
        if numbered:
            return [self._one(entry[name], name, where) for name in numbered], False
        column = first_of(entry, IMAGE_IDS)
        if column is not None:
            place = f"{where}: field {column!r}"
            return [self.folder.find_id(str(entry[column]), place)], False
        raise NoImageError(
            f"{where}: field 'image' should be the path of an image, is missing; expected one of "
            f"{', '.join((*IMAGES, *IMAGE_IDS))}; found {names_of(entry)}"
        )

    def _listed(self, entry: Entry, column: str, where: str) -> tuple[list[Image], bool]:
        value, video = listed(entry[column]), column == "frames"
        if not isinstance(value, (list, tuple)):
            if column in ("images", "frames"):
                raise ValueError(
                    f"{where}: field {column!r} should be a list of images, is {short(value)}"
                )
            return [self._one(value, column, where)], video
        if not value:
            raise ValueError(f"{where}: field {column!r} should be a list of images, is []")
        names = (f"{column}[{number}]" for number in range(len(value)))
        return [self._one(one, name, where) for one, name in zip(value, names)], video

    def _one(self, value: Any, column: str, where: str) -> Image:
        return resolve(value, f"{where}: field {column!r}", self.folder, self.names_rows)


def _meta(entry: Entry, where: str) -> dict[str, Any]:
    meta = entry.get("meta")
    if meta is not None and not isinstance(meta, Mapping):
        raise ValueError(f"{where}: field 'meta' should be an object, is {short(meta)}")
    return dict(meta or {})


def _image_id(entry: Entry) -> str | None:
    value = next((entry[name] for name in IMAGE_IDS if not missing(entry.get(name))), None)
    return None if value is None else str(value)
