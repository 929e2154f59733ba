"""Layout of a scene: what stands where, before anything is drawn."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from tokprune.eval.benchmarks.mini.world import (
    CELL,
    COLORS,
    DIGITS,
    DISTRACTORS,
    GRID,
    LETTERS,
    PLATES,
    SHAPES,
    SIZES,
    SPRITES,
    WORDS,
)

#: beginnings that a plate's letters must not have
_SPELLED = tuple(word for word in WORDS if len(word) > 1)


@dataclass(frozen=True)
class Thing:
    """An object: ``kind`` (a shape or sprite name, or "" for a distractor), ``color`` (shapes
    only, else ""), ``size`` (a name in SIZES), ``row``, ``col`` of its top left patch."""

    kind: str
    color: str
    size: str
    row: int
    col: int
    code: int = 0

    @property
    def side(self) -> int:
        return SIZES[self.size]

    @property
    def center(self) -> tuple[float, float]:
        """(row, col) of its middle, in patches."""
        return self.row + self.side / 2, self.col + self.side / 2


@dataclass(frozen=True)
class Plate:
    """A text plate; ``row``, ``col`` of its top left patch, ``text`` of letters or of digits."""

    text: str
    color: str
    row: int
    col: int

    @property
    def is_number(self) -> bool:
        return self.text[0] in DIGITS

    @property
    def width(self) -> int:
        return CELL * len(self.text)


@dataclass(frozen=True)
class Scene:
    """``key`` seeds all that is random; ``things`` have a name, ``distractors`` none."""

    key: tuple[int, int]
    things: tuple[Thing, ...]
    distractors: tuple[Thing, ...]
    plates: tuple[Plate, ...]


def random_state(key: tuple[int, int], purpose: str) -> np.random.RandomState:
    """Random numbers of a scene; RandomState, since NumPy froze its streams for good."""
    digest = hashlib.sha256(f"{purpose} {key[0]} {key[1]}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest[:16], dtype=np.uint32))


def make_scene(seed: int, number: int) -> Scene:
    """Scene ``number`` of a stream: 10 to 20 named objects, 2 to 6 distractors, 2 to 4 plates."""
    key = (seed, number)
    rng = random_state(key, "scene")
    taken = np.zeros((GRID, GRID), dtype=bool)
    plates = _plates(rng, taken)
    things = []
    for kind, color in _cast(rng):
        if (thing := place(rng, taken, kind, color)) is not None:
            things.append(thing)
    distractors = []
    for _ in range(rng.randint(2, 7)):
        code = DISTRACTORS[rng.randint(len(DISTRACTORS))]
        if (thing := place(rng, taken, "", "", code)) is not None:
            distractors.append(thing)
    return Scene(key, tuple(things), tuple(distractors), tuple(plates))


def _cast(rng: np.random.RandomState) -> list[tuple[str, str]]:
    """Kinds and colours, with one to four of each kind, largest groups first to find room."""
    total = rng.randint(10, 21)
    colors = rng.permutation(list(COLORS))[: rng.randint(4, 8)]
    shapes = list(rng.permutation(list(SHAPES)))
    sprites = list(rng.permutation(list(SPRITES)))
    cast: list[tuple[str, str]] = []
    while len(cast) < total and shapes and sprites:
        many = min(int(rng.choice([1, 1, 1, 2, 2, 3, 4])), total - len(cast))
        if rng.rand() < 0.55:
            kind = str(shapes.pop())
            cast += [(kind, str(colors[rng.randint(len(colors))])) for _ in range(many)]
        else:
            cast += [(str(sprites.pop()), "")] * many
    return [cast[i] for i in rng.permutation(len(cast))]


def _plates(rng: np.random.RandomState, taken: np.ndarray) -> list[Plate]:
    count = rng.randint(2, 5)
    numbers = rng.randint(1, count)
    colors = rng.permutation(list(PLATES))[:count]
    plates = []
    for i, color in enumerate(colors):
        if i < numbers:
            text = str(rng.randint(10, 1000))
        else:
            text = random_word(rng)
        spot = free_spot(rng, taken, CELL, CELL * len(text))
        if spot is not None:
            plates.append(Plate(text, str(color), *spot))
    return plates


def random_word(rng: np.random.RandomState) -> str:
    """Three or four random letters that do not begin with a word of the questions: such a text
    would not be spelled letter by letter."""
    while True:
        text = "".join(LETTERS[j] for j in rng.randint(0, 26, size=rng.randint(3, 5)))
        if not text.startswith(_SPELLED):
            return text


def place(
    rng: np.random.RandomState, taken: np.ndarray, kind: str, color: str, code: int = 0
) -> Thing | None:
    """An object of a random size on a free spot; None where there is none."""
    size = str(rng.choice(list(SIZES), p=[0.5, 0.3, 0.2]))
    spot = free_spot(rng, taken, SIZES[size], SIZES[size])
    return None if spot is None else Thing(kind, color, size, *spot, code=code)


def free_spot(
    rng: np.random.RandomState, taken: np.ndarray, height: int, width: int
) -> tuple[int, int] | None:
    """A free rectangle, marked as taken; None where fifty throws find none."""
    for _ in range(50):
        row = int(rng.randint(0, GRID - height + 1))
        col = int(rng.randint(0, GRID - width + 1))
        area = taken[row : row + height, col : col + width]
        if not area.any():
            area[:] = True
            return row, col
    return None
