"""A clip as data: who is where in which frame, before anything is drawn."""

from __future__ import annotations

from dataclasses import dataclass

from tokprune.eval.benchmarks.mini.scene import Plate, Thing
from tokprune.eval.benchmarks.mini.world import COLORS, KINDS, SIDE

#: frames of a clip
FRAMES = 8
#: fewest frames in which everything that is asked about can happen
LEAST_FRAMES = 4

GROUPS = {
    "motion": ("moved", "direction", "first"),
    "change": ("appeared", "flashed"),
}
TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)

#: how often the best guess from the question and any one frame can be correct; for a text, in a
#: frame of its flash (in the others it is not to be seen)
CHANCE = {"moved": 1 / 4, "direction": 1 / 2, "first": 1 / 2, "appeared": 1 / 4, "flashed": 1 / 4}

#: answer → unit step (x, y), in pixels
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_WORDS = """
    which shape moved did the move left right up down or first how many objects appeared what text
    flashed ? ,
"""
#: every word that a question or an answer can hold, plate texts and counts aside
WORDS = tuple(dict.fromkeys([*_WORDS.split(), *KINDS, *COLORS]))


@dataclass(frozen=True)
class Actor:
    """A named object that may move or come and go.

    ``kind``, ``color``: as of a ``Thing``; ``side``: pixels; ``x``, ``y``: of its top left corner
    in frame 0, 0 ≤ x, y < SIDE; ``step``: (x, y) pixels from one frame to the next, while it
    moves: from frame ``moves[0]`` to frame ``moves[1]``; ``seen``: it is there from frame
    ``seen[0]`` to the frame before ``seen[1]``.

    The image's edges meet: what leaves at one comes in at the opposite one, so that an object on
    an edge is cut in two, and all of it is always to be seen.
    """

    kind: str
    color: str
    side: int
    x: int
    y: int
    step: tuple[int, int]
    moves: tuple[int, int]
    seen: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}" if self.color else self.kind

    def at(self, frame: int) -> tuple[int, int] | None:
        """(x, y) of its top left corner; None while it is not there."""
        if not self.seen[0] <= frame < self.seen[1]:
            return None
        done = min(max(frame, self.moves[0]), self.moves[1]) - self.moves[0]
        return (self.x + done * self.step[0]) % SIDE, (self.y + done * self.step[1]) % SIDE


@dataclass(frozen=True)
class Sign:
    """A text plate that is there from frame ``seen[0]`` to the frame before ``seen[1]``."""

    plate: Plate
    seen: tuple[int, int]

    def visible(self, frame: int) -> bool:
        return self.seen[0] <= frame < self.seen[1]


@dataclass(frozen=True)
class Clip:
    """A clip with its question.

    ``key`` seeds the ground and the noise; ``distractors`` have no name and never change; ``signs``
    lie over the actors if ``signs_on_top``, else under them. ``targets``: actors, by index, that
    the answer is about; ``flash``: the sign that it is about, by index, if any.
    """

    key: tuple[int, int]
    task: str
    frames: int
    actors: tuple[Actor, ...]
    distractors: tuple[Thing, ...]
    signs: tuple[Sign, ...]
    signs_on_top: bool
    question: str
    answer: str
    targets: tuple[int, ...] = ()
    flash: int | None = None
