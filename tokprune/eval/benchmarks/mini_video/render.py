"""Pixels of a clip: the ground and the objects of the mini world, frame by frame."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tokprune.eval.benchmarks.mini.render import draw_plate, figure, ground, paste
from tokprune.eval.benchmarks.mini.scene import random_state
from tokprune.eval.benchmarks.mini.world import GRID, PATCH, SIDE
from tokprune.eval.benchmarks.mini_video.clip import Clip

#: every value of every pixel is off by up to this much, anew in every frame, as in a camera
NOISE = 2


def render(clip: Clip, noise: int = NOISE) -> list[Image.Image]:
    """The frames of a clip, RGB, SIDE × SIDE. The same clip gives the same pixels.

    Ground and noise follow from the clip's key alone, not from what happens in it.
    """
    rng = random_state(clip.key, f"render {clip.task}")
    still = ground(rng)
    for thing in clip.distractors:
        paste(still, thing, rng)
    return [_noisy(_draw(clip, frame, still), clip, frame, noise) for frame in range(clip.frames)]


def changed(clip: Clip) -> np.ndarray:
    """[T, GRID, GRID] bool: patches with any pixel that differs from the frame before, noise
    aside; none in the first frame."""
    pixels = np.stack([np.asarray(frame) for frame in render(clip, noise=0)])
    patches = pixels.reshape(clip.frames, GRID, PATCH, GRID, PATCH, 3)
    found = np.zeros((clip.frames, GRID, GRID), dtype=bool)
    found[1:] = (patches[1:] != patches[:-1]).any((2, 4, 5))
    return found


def evidence(clip: Clip) -> np.ndarray:
    """[T, GRID, GRID] bool: those changed patches that show what the question is about, where it
    is new: a target in the frames that it has just moved into or appeared in, a text in the first
    frame of its flash."""
    box = np.zeros((clip.frames, GRID, GRID), dtype=bool)
    for actor in (clip.actors[i] for i in clip.targets):
        for frame in range(1, clip.frames):
            place = actor.at(frame)
            if place is not None and place != actor.at(frame - 1):
                rows, cols = (_patches(value, actor.side) for value in (place[1], place[0]))
                box[frame][np.ix_(rows, cols)] = True
    if clip.flash is not None:
        sign = clip.signs[clip.flash]
        row, col = sign.plate.row, sign.plate.col
        box[sign.seen[0], row : row + 2, col : col + sign.plate.width] = True
    return box & changed(clip)


def _patches(start: int, length: int) -> np.ndarray:
    """Patches that pixels ``start`` to ``start + length`` touch, around the edge."""
    return np.arange(start // PATCH, -(-(start + length) // PATCH)) % GRID


def _draw(clip: Clip, frame: int, still: Image.Image) -> Image.Image:
    image = still.copy()
    if not clip.signs_on_top:
        _draw_signs(clip, frame, image)
    for actor in clip.actors:
        place = actor.at(frame)
        if place is not None:
            sprite = figure(actor.kind, actor.color, 0, actor.side)
            for x in _around(place[0], actor.side):
                for y in _around(place[1], actor.side):
                    image.paste(sprite, (x, y), sprite)
    if clip.signs_on_top:
        _draw_signs(clip, frame, image)
    return image


def _around(start: int, length: int) -> list[int]:
    """Where to draw what may reach over the far edge."""
    return [start, start - SIDE] if start + length > SIDE else [start]


def _draw_signs(clip: Clip, frame: int, image: Image.Image) -> None:
    for sign in clip.signs:
        if sign.visible(frame):
            draw_plate(image, sign.plate)


def _noisy(image: Image.Image, clip: Clip, frame: int, noise: int) -> Image.Image:
    if noise == 0:
        return image
    rng = random_state(clip.key, f"noise {clip.task} {frame}")
    off = rng.randint(-noise, noise + 1, size=(SIDE, SIDE, 3))
    pixels = np.clip(np.asarray(image, dtype=np.int16) + off, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))
