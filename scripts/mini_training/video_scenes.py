"""Clips to train on: those of the benchmark's layouts, with roles that answer more questions.

A clip of the benchmark answers one question. In a clip of motion here every object draws a role of
its own, so that most of them can be asked about.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tokprune.eval.benchmarks.mini.scene import random_state
from tokprune.eval.benchmarks.mini.world import GRID
from tokprune.eval.benchmarks.mini_video.clip import FRAMES, Actor, Clip, Sign
from tokprune.eval.benchmarks.mini_video.layout import SHAPES_IN_LANES, distractors, lanes, texts
from tokprune.eval.benchmarks.mini_video.make import SPEED, make_clip

#: shares of the three layouts
SHARES = {"motion": 0.3, "appeared": 0.4, "flashed": 0.3}
#: what an object of a clip of motion does, and how often
ROLES = {"still": 0.3, "all": 0.3, "early": 0.2, "late": 0.2}
#: of clips of motion, those in which exactly one shape moves
ONE_SHAPE = 0.6
LONG = (FRAMES - 1) // 2
MOVES = {"all": (0, FRAMES - 1), "early": (0, LONG), "late": (FRAMES - 1 - LONG, FRAMES - 1)}


def training_clip(seed: int, number: int, level: float = 1.0) -> Clip:
    """A clip of one of the layouts; at level 0 with few objects, at level 1 with all."""
    rng = random_state((seed, number), "training clip")
    layout = rng.choice(list(SHARES), p=list(SHARES.values()))
    clip = _motion(rng, (seed, number)) if layout == "motion" else make_clip(seed, number, layout)
    # every other one is easier still, so that what lags behind the level is seen at its own
    return easier(clip, level if rng.rand() < 0.5 else level * rng.rand(), rng)


def easier(clip: Clip, level: float, rng: np.random.RandomState) -> Clip:
    """The clip with part of what does not matter: 3 objects and 1 text at level 0. Of those that
    come and go, any may be left out."""
    if level >= 1:
        return clip
    kept = round(3 + level * (len(clip.actors) - 3))
    order = [int(i) for i in rng.permutation(len(clip.actors))]
    if clip.task == "appeared":  # at least one that appears
        order.sort(key=lambda i: i != clip.targets[0])
    else:  # rather those that move
        order.sort(key=lambda i: clip.actors[i].step == (0, 0) and rng.rand() < 0.5)
        order.sort(key=lambda i: i not in clip.targets)
    signs = [int(i) for i in rng.permutation(len(clip.signs))]
    signs = sorted(signs, key=lambda i: i != clip.flash)
    signs = signs[: round(1 + level * (len(signs) - 1))]
    return replace(
        clip,
        actors=tuple(clip.actors[i] for i in sorted(order[:kept])),
        signs=tuple(clip.signs[i] for i in sorted(signs)),
        distractors=clip.distractors[: round(level * len(clip.distractors))],
    )


def _motion(rng: np.random.RandomState, key: tuple[int, int]) -> Clip:
    axis = int(rng.randint(2))
    actors = lanes(rng, axis, FRAMES)
    roles = [str(role) for role in rng.choice(list(ROLES), len(actors), p=list(ROLES.values()))]
    targets: tuple[int, ...] = ()
    if rng.rand() < ONE_SHAPE:
        target = int(rng.randint(SHAPES_IN_LANES))
        roles[:SHAPES_IN_LANES] = ["still"] * SHAPES_IN_LANES
        roles[target], targets = "all", (target,)
    actors = [_in_role(rng, actor, role, axis) for actor, role in zip(actors, roles)]
    taken = np.zeros((GRID, GRID), dtype=bool)
    signs = [Sign(plate, (0, FRAMES)) for plate in texts(rng, taken, 2)]
    if rng.rand() < 0.5:
        start = int(rng.randint(1, FRAMES - 2))
        signs[0] = replace(signs[0], seen=(start, start + int(rng.randint(1, 3))))
    clutter = distractors(rng, taken)
    return Clip(
        key, "moved", FRAMES, tuple(actors), tuple(clutter), tuple(signs), False, "", "", targets
    )


def _in_role(rng: np.random.RandomState, actor: Actor, role: str, axis: int) -> Actor:
    if role == "still":
        return actor
    along = int(rng.randint(SPEED[0], SPEED[1] + 1)) * (1 if rng.rand() < 0.5 else -1)
    return replace(actor, step=(along, 0) if axis == 0 else (0, along), moves=MOVES[role])
