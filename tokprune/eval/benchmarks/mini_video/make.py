"""Clips for the five types of question: a layout, then roles by lot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tokprune.eval.benchmarks.mini.scene import random_state
from tokprune.eval.benchmarks.mini.world import GRID
from tokprune.eval.benchmarks.mini_video.clip import (
    DIRECTIONS,
    FRAMES,
    LEAST_FRAMES,
    TASKS,
    Actor,
    Clip,
    Sign,
)
from tokprune.eval.benchmarks.mini_video.layout import (
    LANES,
    SHAPES_IN_LANES,
    distractors,
    lanes,
    spots,
    texts,
)

#: pixels from one frame to the next, least and most
SPEED = (5, 9)
#: highest count that is asked for
MOST = 4
#: texts of which one flashes
TEXTS = 4


def make_clip(seed: int, number: int, task: str, frames: int = FRAMES) -> Clip:
    """Clip ``number`` of a stream for a type of question.

    Directions, counts and the order of names take turns with ``number``; all else is drawn.

    Raises:
        ValueError: unknown ``task``, or fewer than ``LEAST_FRAMES`` frames.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} should be one of {', '.join(TASKS)}")
    if frames < LEAST_FRAMES:
        raise ValueError(f"frames={frames} should be at least {LEAST_FRAMES}")
    key = (seed, number)
    return _MAKE[task](key, random_state(key, f"clip {task}"), frames)


def _moved(key: tuple[int, int], rng: np.random.RandomState, frames: int) -> Clip:
    """One of the shapes moves; sprites may."""
    axis = int(rng.randint(2))
    actors = lanes(rng, axis, frames)
    target = int(rng.randint(SHAPES_IN_LANES))
    actors[target] = _moving(rng, actors[target], axis, frames)
    for i in range(SHAPES_IN_LANES, LANES):
        actors[i] = _perhaps_moving(rng, actors[i], axis, frames)
    return _in_motion(
        key, rng, "moved", frames, actors, "which shape moved ?", actors[target].name, (target,)
    )


def _direction(key: tuple[int, int], rng: np.random.RandomState, frames: int) -> Clip:
    """One that moves is asked about; the others may move, either way."""
    answer = list(DIRECTIONS)[key[1] % 4]
    axis = 0 if answer in ("left", "right") else 1
    actors = lanes(rng, axis, frames)
    target = int(rng.randint(LANES))
    for i, actor in enumerate(actors):
        if i != target:
            actors[i] = _perhaps_moving(rng, actor, axis, frames)
    actors[target] = _moving(rng, actors[target], axis, frames, sum(DIRECTIONS[answer]))
    ways = ("left or right", "up or down")[axis]
    question = f"did the {actors[target].name} move {ways} ?"
    return _in_motion(key, rng, "direction", frames, actors, question, answer, (target,))


def _first(key: tuple[int, int], rng: np.random.RandomState, frames: int) -> Clip:
    """Two move one after the other, equally long; the others may move all the time."""
    axis = int(rng.randint(2))
    actors = lanes(rng, axis, frames)
    early, late = (int(i) for i in rng.permutation(LANES)[:2])
    for i, actor in enumerate(actors):
        if i not in (early, late):
            actors[i] = _perhaps_moving(rng, actor, axis, frames)
    last, long = frames - 1, (frames - 1) // 2
    for i, moves in ((early, (0, long)), (late, (last - long, last))):
        actors[i] = replace(_moving(rng, actors[i], axis, frames), moves=moves)
    pair = (early, late) if key[1] % 2 == 0 else (late, early)
    one, other = (actors[i].name for i in pair)
    question = f"which moved first , the {one} or the {other} ?"
    return _in_motion(
        key, rng, "first", frames, actors, question, actors[early].name, (early, late)
    )


def _appeared(key: tuple[int, int], rng: np.random.RandomState, frames: int) -> Clip:
    """Some appear and about as many vanish.

    So that the number of objects in a frame says nothing of the count: with every one that appears
    one vanishes, in the same frame, but for one that may vanish or appear alone.
    """
    actors, clutter, plates = spots(rng, frames)
    count = key[1] % MOST + 1
    there = int(rng.randint(MOST + 1, MOST + 3))  # in the first frame
    alone = int(rng.randint(-1, 2))  # one more that appears (+1) or vanishes (-1)
    when = [int(f) for f in rng.randint(1, frames, size=MOST + 1)]
    come, go = when[:count], when[:count]
    if alone > 0:  # the last one that comes has no partner
        go = go[:-1]
    elif alone < 0:
        go = [*go, when[MOST]]
    seen = [(0, frame) for frame in go] + [(0, frames)] * (there - len(go))
    seen += [(frame, frames) for frame in come]
    seen += [(0, 0)] * (len(actors) - len(seen))
    actors = [replace(actor, seen=own) for actor, own in zip(actors, seen)]
    order = rng.permutation(len(actors))
    actors = [actors[i] for i in order]
    targets = tuple(i for i, actor in enumerate(actors) if actor.seen[0] > 0)
    return Clip(
        key, "appeared", frames, tuple(actors), tuple(clutter),
        tuple(Sign(plate, (0, frames)) for plate in plates), False,
        "how many objects appeared ?", str(count), targets,
    )  # fmt: skip


def _flashed(key: tuple[int, int], rng: np.random.RandomState, frames: int) -> Clip:
    """One of the texts is there for one or two frames, not the first and not the last."""
    axis = int(rng.randint(2))
    actors = [_perhaps_moving(rng, a, axis, frames) for a in lanes(rng, axis, frames)]
    clutter = distractors(rng, np.zeros((GRID, GRID), dtype=bool))
    plates = texts(rng, np.zeros((GRID, GRID), dtype=bool), TEXTS)
    flash = int(rng.randint(TEXTS))
    signs = [Sign(plate, (0, frames)) for plate in plates]
    signs[flash] = Sign(plates[flash], _moment(rng, frames))
    return Clip(
        key, "flashed", frames, tuple(actors), tuple(clutter), tuple(signs), True,
        "what text flashed ?", plates[flash].text, flash=flash,
    )  # fmt: skip


def _in_motion(
    key: tuple[int, int],
    rng: np.random.RandomState,
    task: str,
    frames: int,
    actors: list[Actor],
    question: str,
    answer: str,
    targets: tuple[int, ...],
) -> Clip:
    """A clip about motion; two texts, of which one may flash, lie under the actors."""
    taken = np.zeros((GRID, GRID), dtype=bool)
    signs = [Sign(plate, (0, frames)) for plate in texts(rng, taken, 2)]
    if rng.rand() < 0.5:
        signs[0] = replace(signs[0], seen=_moment(rng, frames))
    clutter = distractors(rng, taken)
    return Clip(
        key, task, frames, tuple(actors), tuple(clutter), tuple(signs), False, question, answer,
        targets,
    )  # fmt: skip


def _moving(
    rng: np.random.RandomState, actor: Actor, axis: int, frames: int, sign: int | None = None
) -> Actor:
    """The actor moving in all frames, either way unless ``sign`` says which."""
    speed = int(rng.randint(SPEED[0], SPEED[1] + 1))
    either = 1 if rng.rand() < 0.5 else -1
    along = speed * (either if sign is None else sign)
    step = (along, 0) if axis == 0 else (0, along)
    return replace(actor, step=step, moves=(0, frames - 1))


def _perhaps_moving(rng: np.random.RandomState, actor: Actor, axis: int, frames: int) -> Actor:
    return _moving(rng, actor, axis, frames) if rng.rand() < 0.5 else actor


def _moment(rng: np.random.RandomState, frames: int) -> tuple[int, int]:
    """One or two frames, neither the first nor the last."""
    long = int(rng.randint(1, 3))
    start = int(rng.randint(1, frames - long))
    return start, start + long


_MAKE: dict[str, Callable[[tuple[int, int], np.random.RandomState, int], Clip]] = {
    "moved": _moved,
    "direction": _direction,
    "first": _first,
    "appeared": _appeared,
    "flashed": _flashed,
}
