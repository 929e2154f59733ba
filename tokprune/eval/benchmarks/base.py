"""The benchmark interface: items with images, a score per answer, tasks in groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Item:
    """One question.

    ``id``: unique in its benchmark and stable between runs; ``task``: question type;
    ``image_id``: equal for questions about the same image; ``answers``: all accepted;
    ``meta``: anything else, in JSON types.
    """

    id: str
    task: str
    image_id: str
    question: str
    answers: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


def evenly_spaced(items: Sequence[Item], number: int) -> list[Item]:
    """``number`` items, evenly spaced over all."""
    number = min(number, len(items))
    return [items[n * len(items) // number] for n in range(number)]


class Benchmark(ABC):
    """A set of questions about images, or about videos.

    Attributes: ``name``; ``media`` ("image": :meth:`image` gives what an item shows; "video":
    :meth:`video` does); ``version`` (changes whenever an item or a score could); ``splits``
    (names, the default first); ``tasks`` (question types, in display order); ``groups`` (display
    name → its tasks; a task may be in none); ``headline`` (tasks that count in the macro average);
    ``prompt_suffix`` (appended to every question, "" for none); ``max_new_tokens`` (longest
    answer); ``scoring`` (name of the rule of :meth:`score`); ``shape`` (of a file: how it was read,
    else None); ``notes`` (what a user should know before the first answer).
    """

    name: str
    version: str
    splits: tuple[str, ...]
    tasks: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    headline: tuple[str, ...]
    media: Literal["image", "video"] = "image"
    prompt_suffix: str = ""
    max_new_tokens: int = 16
    scoring: str = "exact"
    shape: str | None = None
    notes: tuple[str, ...] = ()

    @abstractmethod
    def items(
        self, split: str | None = None, tasks: Sequence[str] | None = None, limit: int | None = None
    ) -> Sequence[Item]:
        """Items of a split in a fixed order; ``limit`` takes a subset balanced over the tasks.

        Raises:
            ValueError: unknown split or task (names what there is), or ``limit`` below 1.
        """

    def version_of(self, items: Sequence[Item]) -> str:
        """The version of a part of the benchmark, as :meth:`items` gives it."""
        return self.version

    def selected(
        self, split: str | None, tasks: Sequence[str] | None, limit: int | None
    ) -> tuple[str, tuple[str, ...]]:
        """Split and tasks that arguments of :meth:`items` mean, for benchmarks that have splits.

        Raises:
            ValueError: see :meth:`items`.
        """
        split = self.splits[0] if split is None else split
        if split not in self.splits:
            raise ValueError(
                f"split={split!r} should be one of {', '.join(map(repr, self.splits))}"
            )
        wanted = self.tasks if tasks is None else tuple(tasks)
        for task in wanted:
            if task not in self.tasks:
                raise ValueError(f"task={task!r} should be one of {', '.join(self.tasks)}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} should be at least 1")
        return split, wanted

    @abstractmethod
    def image(self, item: Item) -> Image.Image:
        """The image of an item, RGB. Made or read when asked; nothing is kept.

        Raises:
            ValueError: the benchmark asks about videos (what this method itself says).
        """
        raise ValueError(
            f"benchmark {self.name} asks about videos, and item {item.id!r} has no image; "
            "video(item) gives its frames"
        )

    def images(self, item: Item) -> list[Image.Image]:
        """All images of an item in order; most have one."""
        return [self.image(item)]

    def video(self, item: Item) -> list[Image.Image]:
        """The frames of an item's video in order, RGB and of one size. Nothing is kept.

        Raises:
            ValueError: the benchmark asks about images.
        """
        raise ValueError(
            f"benchmark {self.name} asks about images, and item {item.id!r} has no video; "
            "image(item) gives its image"
        )

    def score(self, item: Item, answer: str) -> float:
        """1.0 for a correct answer, 0.0 for an incorrect one (fractions where a suite has them).

        Exact match after trimming, lower-casing and dropping a final full stop.
        """
        return exact(answer, item)


def exact(answer: str, item: Item) -> float:
    """1 where the answer is an accepted one, after trimming, lower-casing and dropping a final full
    stop; else 0."""
    text = normalise(answer)
    return float(any(text == normalise(accepted) for accepted in item.answers if accepted.strip()))


def normalise(answer: str) -> str:
    """An answer as it is compared: one space between words, lower case, no final full stop."""
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()
