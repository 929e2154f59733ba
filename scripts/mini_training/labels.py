"""What every patch of a scene shows: the supervision of the tower and of the symbolic stage."""

from __future__ import annotations

import numpy as np

from tokprune.eval.benchmarks.mini.scene import Scene
from tokprune.eval.benchmarks.mini.world import (
    CELL,
    CHARACTERS,
    COLORS,
    GRID,
    KINDS,
    PATCH,
    PLATES,
    SIZES,
)

#: fields of a patch and the number of their values; 0 stands for "none"
FIELDS = {
    "kind": len(KINDS) + 3,  # ground, kinds, a distractor, a plate
    "color": len(COLORS) + 1,
    "size": len(SIZES) + 1,
    "role": 3,  # 1: the one patch that stands for its object or character, 2: any other
    "char": len(CHARACTERS) + 1,
    "plate": len(PLATES) + 1,
    "place": 5,  # 1…4: number of the character in its text
    "row": GRID,
    "col": GRID,
}
DISTRACTOR, PLATE = len(KINDS) + 1, len(KINDS) + 2
#: mean colours of the four quarters of a patch
TEXTURE = 12

_KIND = {kind: i + 1 for i, kind in enumerate(KINDS)}
_COLOR = {color: i + 1 for i, color in enumerate(COLORS)}
_SIZE = {size: i + 1 for i, size in enumerate(SIZES)}
_CHAR = {char: i + 1 for i, char in enumerate(CHARACTERS)}
_PLATE = {plate: i + 1 for i, plate in enumerate(PLATES)}


def patch_labels(scene: Scene) -> np.ndarray:
    """[GRID · GRID, len(FIELDS)] int64, columns in the order of FIELDS."""
    label = np.zeros((GRID, GRID, len(FIELDS)), dtype=np.int64)
    label[:, :, 7] = np.arange(GRID)[:, None]
    label[:, :, 8] = np.arange(GRID)[None, :]
    for thing in (*scene.distractors, *scene.things):
        side = thing.side
        area = label[thing.row : thing.row + side, thing.col : thing.col + side]
        kind = _KIND.get(thing.kind, DISTRACTOR)
        area[:, :, :4] = (kind, _COLOR.get(thing.color, 0), _SIZE[thing.size], 2)
        area[side // 2, side // 2, 3] = 1
    for plate in scene.plates:
        for i, character in enumerate(plate.text):
            col = plate.col + CELL * i
            area = label[plate.row : plate.row + CELL, col : col + CELL]
            area[:, :, 0], area[:, :, 3] = PLATE, 2
            area[:, :, 4], area[:, :, 5] = _CHAR[character], _PLATE[plate.color]
            area[:, :, 6] = i + 1
            area[CELL // 2, CELL // 2, 3] = 1
    return label.reshape(GRID * GRID, len(FIELDS))


def patch_texture(pixels: np.ndarray) -> np.ndarray:
    """[GRID · GRID, TEXTURE] float32 of a picture [SIDE, SIDE, 3] uint8: mean colour of each
    quarter patch, about zero mean and unit variance."""
    half = PATCH // 2
    mean = pixels.reshape(GRID, 2, half, GRID, 2, half, 3).mean((2, 5), dtype=np.float32)
    mean = mean.transpose(0, 2, 1, 3, 4).reshape(GRID * GRID, TEXTURE)
    return (mean - 127.0) / 60.0
