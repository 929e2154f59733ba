"""What a report is made of, before it is HTML or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from tokprune.eval.report.plots import Plot


@dataclass(frozen=True)
class Text:
    """A paragraph; ``warning`` ones stand out."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Bullets:
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text. ``words``: columns that hold words, not numbers; ``strong``: rows to stand out;
    ``struck``: rows that are no results; ``folded``: hidden behind its title until asked for."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    words: frozenset[int] = frozenset({0})
    strong: frozenset[int] = frozenset()
    struck: frozenset[int] = frozenset()
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    plot: Plot
    caption: str


@dataclass(frozen=True)
class Card:
    """A variant's answer to a question, on the image as the variant saw it. ``image``: data URI."""

    variant: str
    detail: str
    answer: str
    correct: bool
    image: str


@dataclass(frozen=True)
class Exhibit:
    """A question of the gallery; ``unpruned`` None where that model gave no answer."""

    question: str
    task: str
    answers: tuple[str, ...]
    unpruned: Card | None
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Gallery:
    exhibits: tuple[Exhibit, ...]


Block: TypeAlias = "Text | Bullets | Code | Table | Figure | Gallery"


@dataclass(frozen=True)
class Section:
    """``key``: anchor in the page; ``short``: the title in the bar of links."""

    key: str
    title: str
    blocks: list[Block] = field(default_factory=list)
    short: str = ""


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
