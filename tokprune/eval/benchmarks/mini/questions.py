"""Questions about a scene, twelve types in four groups; every answer is decided by the layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from tokprune.eval.benchmarks.mini.scene import Scene, Thing
from tokprune.eval.benchmarks.mini.world import COLORS, GRID, KINDS

GROUPS = {
    "recognition": ("presence", "attribute", "color", "shape"),
    "counting": ("count", "tally"),
    "spatial": ("size", "where", "relation"),
    "reading": ("number", "word", "plate"),
}
TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)
#: highest count that is asked for
MOST = 4

#: a question and its answer
Pair = tuple[str, str]
T = TypeVar("T")


def ask(scene: Scene, task: str, rng: np.random.RandomState) -> Pair | None:
    """One question of a type, or None where the scene has no clear one.

    ``rng`` decides which; yes and no are asked equally often.
    """
    return _ASK[task](scene, rng)


def _a(name: object) -> str:
    """The name with its article."""
    return f"{'an' if str(name)[0] in 'aeiou' else 'a'} {name}"


def _pick(rng: np.random.RandomState, choices: list[T]) -> T:
    return choices[rng.randint(len(choices))]


def _unique(scene: Scene) -> dict[str, Thing]:
    """Things that are the only one of their kind, by kind."""
    number = Counter(t.kind for t in scene.things)
    return {t.kind: t for t in scene.things if number[t.kind] == 1}


def _presence(scene: Scene, rng: np.random.RandomState) -> Pair | None:
    """Half about kinds alone, half about a coloured shape; an incorrect one of these has a colour
    and a shape that do occur, on different objects (a hard negative)."""
    here = {(t.kind, t.color) for t in scene.things if t.color}
    if rng.rand() < 0.5 and here:
        if rng.rand() < 0.5:
            kind, color = _pick(rng, sorted(here))
            return f"is there {_a(color)} {kind} ?", "yes"
        kinds, colors = sorted({k for k, _ in here}), sorted({c for _, c in here})
        absent = [(k, c) for k in kinds for c in colors if (k, c) not in here]
        if not absent:
            return None
        kind, color = _pick(rng, absent)
        return f"is there {_a(color)} {kind} ?", "no"
    kinds = sorted({t.kind for t in scene.things})
    if rng.rand() < 0.5:
        return f"is there {_a(_pick(rng, kinds))} ?", "yes"
    return f"is there {_a(_pick(rng, [k for k in KINDS if k not in kinds]))} ?", "no"


def _unique_shapes(scene: Scene) -> list[Thing]:
    return [t for t in _unique(scene).values() if t.color]


def _attribute(scene: Scene, rng: np.random.RandomState) -> Pair | None:
    shapes = _unique_shapes(scene)
    if not shapes:
        return None
    thing = _pick(rng, shapes)
    if rng.rand() < 0.5:
        return f"is the {thing.kind} {thing.color} ?", "yes"
    others = sorted({t.color for t in scene.things if t.color} - {thing.color})
    others = others or sorted(set(COLORS) - {thing.color})
    return f"is the {thing.kind} {_pick(rng, others)} ?", "no"


def _color(scene: Scene, rng: np.random.RandomState) -> Pair | None:
    shapes = _unique_shapes(scene)
    if not shapes:
        return None
    thing = _pick(rng, shapes)
    return f"what color is the {thing.kind} ?", thing.color


def _shape(scene: Scene, rng: np.random.RandomState) -> Pair | None:
    number = Counter(t.color for t in scene.things if t.color)
    single = [t for t in scene.things if t.color and number[t.color] == 1]
    if not single:
        return None
    thing = _pick(rng, single)
    return f"what shape is {thing.color} ?", thing.kind


def _counted(number: Counter, rng: np.random.RandomState) -> tuple[str, int] | None:
    """A name with its count; the count is drawn first, so that all are asked about alike."""
    by_count: dict[int, list[str]] = {}
    for name, n in sorted(number.items()):
        if n <= MOST:
            by_count.setdefault(n, []).append(name)
    if not by_count:
        return None
    count = _pick(rng, sorted(by_count))
    return _pick(rng, by_count[count]), count


def _count(scene: Scene, rng: np.random.RandomState) -> Pair | None:
    found = _counted(Counter(t.kind for t in scene.things), rng)
    return None if found is None else (f"how many {found[0]} are there ?", str(found[1]))


def _tally(scene: Scene, rng: np.random.RandomState) -> Pair | None:
    found = _counted(Counter(t.color for t in scene.things if t.color), rng)
    return None if found is None else (f"how many shapes are {found[0]} ?", str(found[1]))


def _size(scene: Scene, rng: np.random.RandomState) -> Pair | None:
    single = sorted(_unique(scene).values(), key=lambda t: t.kind)
    pairs = [(a, b) for a in single for b in single if a.side > b.side]
    if not pairs:
        return None
    large, small = _pick(rng, pairs)
    first, second = (large, small) if rng.rand() < 0.5 else (small, large)
    return f"which is larger , the {first.kind} or the {second.kind} ?", large.kind


def _where(scene: Scene, rng: np.random.RandomState) -> Pair | None:
    """Quadrants; what stands within a patch and a half of a middle line is not asked about."""
    clear = [
        t
        for t in _unique(scene).values()
        if min(abs(t.center[0] - GRID / 2), abs(t.center[1] - GRID / 2)) >= 1.5
    ]
    if not clear:
        return None
    thing = _pick(rng, clear)
    row, col = thing.center
    answer = f"{'top' if row < GRID / 2 else 'bottom'} {'left' if col < GRID / 2 else 'right'}"
    return f"where is the {thing.kind} ?", answer


def _relation(scene: Scene, rng: np.random.RandomState) -> Pair | None:
    single = sorted(_unique(scene).values(), key=lambda t: t.kind)
    axis = rng.randint(2)
    pairs = [
        (a, b) for a in single for b in single if abs(a.center[axis] - b.center[axis]) >= 3
    ]  # fmt: skip
    if not pairs:
        return None
    a, b = _pick(rng, pairs)
    word = ("above", "below") if axis == 0 else ("left of", "right of")
    side = rng.randint(2)
    answer = (a.center[axis] < b.center[axis]) == (side == 0)
    return f"is the {a.kind} {word[side]} the {b.kind} ?", "yes" if answer else "no"


def _only_text(scene: Scene, number: bool) -> str | None:
    texts = [p.text for p in scene.plates if p.is_number == number]
    return texts[0] if len(texts) == 1 else None


def _number(scene: Scene, rng: np.random.RandomState) -> Pair | None:
    text = _only_text(scene, True)
    return None if text is None else ("what number is shown ?", text)


def _word(scene: Scene, rng: np.random.RandomState) -> Pair | None:
    text = _only_text(scene, False)
    return None if text is None else ("what word is shown ?", text)


def _plate(scene: Scene, rng: np.random.RandomState) -> Pair | None:
    if len(scene.plates) < 2:
        return None
    plate = _pick(rng, list(scene.plates))
    return f"what is written on the {plate.color} plate ?", plate.text


_ASK: dict[str, Callable[[Scene, np.random.RandomState], Pair | None]] = {
    "presence": _presence,
    "attribute": _attribute,
    "color": _color,
    "shape": _shape,
    "count": _count,
    "tally": _tally,
    "size": _size,
    "where": _where,
    "relation": _relation,
    "number": _number,
    "word": _word,
    "plate": _plate,
}
