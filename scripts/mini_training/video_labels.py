"""What every visual token of a frame shows: tokens are blocks of 2 × 2 patches.

A block that holds the middle of an object or of a character stands for it; objects move by pixels,
so where that middle is inside the block is told as well. What is hidden below something else is not
named.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mini_training.labels import DISTRACTOR, FIELDS, PLATE
from tokprune.eval.benchmarks.mini.world import (
    CELL,
    CHARACTERS,
    COLORS,
    GRID,
    KINDS,
    PATCH,
    PLATES,
    SIDE,
    SIZES,
)
from tokprune.eval.benchmarks.mini_video.clip import Clip

#: patches per side of a block, blocks per side of a frame, pixels per side of a block
POOL = 2
BLOCKS = GRID // POOL
BLOCK = POOL * PATCH
#: blocks of a frame
TOKENS = BLOCKS * BLOCKS
#: fields that a block has; its row and column are not numbers here but pixels
NAMED = ("kind", "color", "size", "role", "char", "plate", "place")
#: least pixels of a block that belong to what it shows, where no middle is in it
SHARE = 40
#: an object or a character of which less than this is to be seen is not named
VISIBLE_OBJECT, VISIBLE_CHARACTER = 0.3, 0.6

_KIND = {kind: i + 1 for i, kind in enumerate(KINDS)}
_COLOR = {color: i + 1 for i, color in enumerate(COLORS)}
_CHAR = {char: i + 1 for i, char in enumerate(CHARACTERS)}
_PLATE = {plate: i + 1 for i, plate in enumerate(PLATES)}
_PATCHES = {side: i + 1 for i, side in enumerate(SIZES.values())}
assert tuple(FIELDS)[: len(NAMED)] == NAMED


@dataclass
class FrameLabels:
    """``label`` [TOKENS, NAMED] int64; ``place`` [TOKENS, 2] pixels (y, x) of what a block stands
    for, of its own middle where it stands for nothing; ``actor``, ``sign`` [TOKENS]: which actor's
    middle, which sign's character is there, −1 for none."""

    label: np.ndarray
    place: np.ndarray
    actor: np.ndarray
    sign: np.ndarray


@dataclass
class _Piece:
    """Something that is drawn: an object or one character of a text."""

    x: int
    y: int
    side: int
    fields: tuple[int, ...]
    actor: int = -1
    sign: int = -1


def frame_labels(clip: Clip, frame: int) -> FrameLabels:
    pieces = _pieces(clip, frame)
    owner = np.full((SIDE, SIDE), -1, dtype=np.int64)
    for number, piece in enumerate(pieces):
        rows = (piece.y + np.arange(piece.side)) % SIDE
        cols = (piece.x + np.arange(piece.side)) % SIDE
        owner[np.ix_(rows, cols)] = number
    kinds = len(pieces) + 1
    block = owner.reshape(BLOCKS, BLOCK, BLOCKS, BLOCK).transpose(0, 2, 1, 3).reshape(TOKENS, -1)
    index = np.arange(TOKENS)[:, None] * kinds + block + 1
    share = np.bincount(index.ravel(), minlength=TOKENS * kinds).reshape(TOKENS, kinds)[:, 1:]
    label = np.zeros((TOKENS, len(NAMED)), dtype=np.int64)
    middle = (np.arange(BLOCKS) + 0.5) * BLOCK
    place = np.stack(np.meshgrid(middle, middle, indexing="ij"), -1).reshape(TOKENS, 2)
    actor, sign = np.full(TOKENS, -1), np.full(TOKENS, -1)
    if not pieces:
        return FrameLabels(label, place, actor, sign)
    most = share.argmax(1)
    for token in np.flatnonzero(share.max(1) >= SHARE):
        fields = pieces[most[token]].fields
        label[token] = (*fields[:3], 2, 0, fields[5], 0)
    seen = share.sum(0)
    for number, piece in enumerate(pieces):
        if piece.sign >= 0:
            if seen[number] >= VISIBLE_CHARACTER * piece.side**2:
                token = _block(piece.y + PATCH, piece.x + PATCH)
                if label[token, 3] != 1:
                    label[token, :4] = piece.fields[:4]
                label[token, 4:] = piece.fields[4:]
                sign[token] = piece.sign
        elif seen[number] >= VISIBLE_OBJECT * piece.side**2:
            y, x = ((v + piece.side / 2) % SIDE for v in (piece.y, piece.x))
            token = _block(y, x)
            label[token, :4] = piece.fields[:4]
            place[token] = y, x
            actor[token] = piece.actor
    return FrameLabels(label, place, actor, sign)


def block_texture(pixels: np.ndarray) -> np.ndarray:
    """[TOKENS, 12] float32 of a frame [SIDE, SIDE, 3] uint8: mean colours of the four quarters of
    each block."""
    half = BLOCK // 2
    mean = pixels.reshape(BLOCKS, 2, half, BLOCKS, 2, half, 3).mean((2, 5), dtype=np.float32)
    return (mean.transpose(0, 2, 1, 3, 4).reshape(TOKENS, 12) - 127.0) / 60.0


def patches_of(blocks: np.ndarray) -> np.ndarray:
    """Numbers [n · 4] of the patches of n blocks, block by block."""
    row, col = np.divmod(blocks, BLOCKS)
    first = row * POOL * GRID + col * POOL
    return (first[:, None] + np.array([0, 1, GRID, GRID + 1])).ravel()


def _block(y: float, x: float) -> int:
    return int(y) // BLOCK * BLOCKS + int(x) // BLOCK


def _pieces(clip: Clip, frame: int) -> list[_Piece]:
    """In the order in which they are drawn."""
    still, texts, acting = [], [], []
    for thing in clip.distractors:
        fields = (DISTRACTOR, 0, _PATCHES[thing.side], 1, 0, 0, 0)
        still.append(_Piece(thing.col * PATCH, thing.row * PATCH, thing.side * PATCH, fields))
    for number, sign in enumerate(clip.signs):
        if sign.visible(frame):
            plate = sign.plate
            for i, char in enumerate(plate.text):
                fields = (PLATE, 0, 0, 1, _CHAR[char], _PLATE[plate.color], i + 1)
                x = (plate.col + CELL * i) * PATCH
                side = CELL * PATCH
                texts.append(_Piece(x, plate.row * PATCH, side, fields, sign=number))
    for number, actor in enumerate(clip.actors):
        if (at := actor.at(frame)) is not None:
            patches = -(-actor.side // PATCH)
            fields = (_KIND[actor.kind], _COLOR.get(actor.color, 0), _PATCHES[patches], 1, 0, 0, 0)
            acting.append(_Piece(*at, actor.side, fields, actor=number))
    return [*still, *acting, *texts] if clip.signs_on_top else [*still, *texts, *acting]
