"""Where things are, and what they are, before it is drawn by lot which of them does what.

A single frame must not tell what happens in a clip. So nothing of a layout depends on the roles:

- What may move has a lane of its own, from edge to edge, and a place in it drawn evenly from the
  whole of it; the edges meet. Then its place is as evenly spread in every frame, whether it moves
  or not and whichever way, and tells nothing of the places of others, since lanes never touch.
- What may come and go, and texts that may flash, have a spot of their own in all frames, used or
  not.
"""

from __future__ import annotations

import numpy as np

from tokprune.eval.benchmarks.mini.scene import Plate, Thing, free_spot, place, random_word
from tokprune.eval.benchmarks.mini.world import (
    CELL,
    COLORS,
    DISTRACTORS,
    GRID,
    PATCH,
    PLATES,
    SHAPES,
    SIDE,
    SIZES,
    SPRITES,
)
from tokprune.eval.benchmarks.mini_video.clip import Actor

#: objects of a clip whose objects may move: so many shapes, as many sprites, a lane for each
SHAPES_IN_LANES = 4
LANES = 2 * SHAPES_IN_LANES
#: objects of a clip whose objects may come and go
SPOTS = 10

_SIZES, _SHARES = list(SIZES), (0.5, 0.3, 0.2)

#: (kind, colour), no colour for a sprite
Look = tuple[str, str]


def lanes(rng: np.random.RandomState, axis: int, frames: int) -> list[Actor]:
    """``LANES`` actors, each alone in its lane, all at rest; shapes come first, sprites last.

    ``axis``: 0 for lanes from left to right, 1 from top to bottom.
    """
    while True:
        sizes = [SIZES[str(name)] for name in rng.choice(_SIZES, LANES, p=_SHARES)]
        if sum(sizes) <= GRID:
            break
    gaps = rng.multinomial(GRID - sum(sizes), [1 / (LANES + 1)] * (LANES + 1))
    starts = np.cumsum(gaps[:LANES]) + np.cumsum([0, *sizes[:-1]])
    looks = [*_shapes(rng, SHAPES_IN_LANES), *_sprites(rng, LANES - SHAPES_IN_LANES)]
    actors = []
    for look, lane in zip(looks, rng.permutation(LANES)):
        side, slack = _shrink(rng, sizes[lane])
        across = int(starts[lane]) * PATCH + slack[0]
        along = int(rng.randint(SIDE))
        x, y = (along, across) if axis == 0 else (across, along)
        actors.append(_at_rest(look, side, x, y, frames))
    return actors


def spots(rng: np.random.RandomState, frames: int) -> tuple[list[Actor], list[Thing], list[Plate]]:
    """``SPOTS`` actors at rest in random order, 2 to 4 distractors, 2 plates; none overlap."""
    while True:
        taken = np.zeros((GRID, GRID), dtype=bool)
        plates = texts(rng, taken, 2)
        looks = [*_shapes(rng, SPOTS // 2), *_sprites(rng, SPOTS - SPOTS // 2)]
        actors = []
        for look in (looks[i] for i in rng.permutation(SPOTS)):
            if (thing := place(rng, taken, *look)) is None:
                break
            side, slack = _shrink(rng, thing.side)
            x, y = thing.col * PATCH + slack[0], thing.row * PATCH + slack[1]
            actors.append(_at_rest(look, side, x, y, frames))
        if len(actors) == SPOTS:
            return actors, distractors(rng, taken), plates


def texts(rng: np.random.RandomState, taken: np.ndarray, number: int) -> list[Plate]:
    """Plates of different colours and texts, numbers or words; the grid must have room."""
    plates: list[Plate] = []
    for color in rng.permutation(list(PLATES))[:number]:
        spot = None
        while spot is None:
            text = str(rng.randint(10, 1000)) if rng.rand() < 0.5 else random_word(rng)
            if all(text != other.text for other in plates):
                spot = free_spot(rng, taken, CELL, CELL * len(text))
        plates.append(Plate(text, str(color), *spot))
    return plates


def distractors(rng: np.random.RandomState, taken: np.ndarray) -> list[Thing]:
    """Two to four objects without a name, fewer where there is no room."""
    codes = [DISTRACTORS[i] for i in rng.randint(len(DISTRACTORS), size=rng.randint(2, 5))]
    things = [place(rng, taken, "", "", code) for code in codes]
    return [thing for thing in things if thing is not None]


def _shapes(rng: np.random.RandomState, number: int) -> list[Look]:
    """Coloured shapes, no two alike, of three kinds and three colours: most share one of them."""
    kinds = [str(kind) for kind in rng.permutation(list(SHAPES))[:3]]
    colors = [str(color) for color in rng.permutation(list(COLORS))[:3]]
    pairs = [(kind, color) for kind in kinds for color in colors]
    return [pairs[i] for i in rng.permutation(len(pairs))[:number]]


def _sprites(rng: np.random.RandomState, number: int) -> list[Look]:
    return [(str(kind), "") for kind in rng.permutation(list(SPRITES))[:number]]


def _shrink(rng: np.random.RandomState, patches: int) -> tuple[int, tuple[int, int]]:
    """Pixels of a side, up to three less than the box has, and an offset (x, y) inside the box."""
    box = patches * PATCH
    side = box - int(rng.randint(0, 4))
    x, y = rng.randint(0, box - side + 1, 2)
    return side, (int(x), int(y))


def _at_rest(look: Look, side: int, x: int, y: int, frames: int) -> Actor:
    return Actor(*look, side, x, y, step=(0, 0), moves=(0, 0), seen=(0, frames))
