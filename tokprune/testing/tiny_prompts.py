"""Prompt makers that several of the newer tiny families share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

from tokprune.testing.pieces import Piece, PromptMaker
from tokprune.testing.tiny import IMAGE_SIZE, IMAGE_TOKEN

BEGIN_TOKEN = 90
END_TOKEN = 91
#: stands around or between tiles
AROUND_TOKEN = 92
#: stands before the thumbnail
GLOBAL_TOKEN = 93
#: text id that stands for a line break
BREAK = 13


class StackedPrompts(PromptMaker):
    """Families whose images are all of one size: ``pixel_values`` [images, 3, H, W]."""

    def layout(self, model: Any) -> list[int]:
        """Prompt tokens of an image."""
        raise NotImplementedError

    def image(self, model: Any, size: tuple[int, int], generator: torch.Generator) -> Piece:
        side = model.config.vision_config.image_size
        ids = self.layout(model)
        pixels = torch.randn(3, side, side, generator=generator)
        return Piece(ids, [int(i == IMAGE_TOKEN) for i in ids], {"pixel_values": pixels})

    def collate(self, images: Sequence[Piece], videos: Sequence[Piece]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([i.inputs["pixel_values"] for i in images])}

    def cut(
        self, inputs: dict[str, Tensor], row: int, images: slice, videos: slice
    ) -> dict[str, Tensor]:
        return {"pixel_values": inputs["pixel_values"][images]}


_serial = count()


@dataclass
class Placed(Piece):
    """A piece that knows its place among images and videos together."""

    number: int = field(default_factory=lambda: next(_serial))


def tile_grid(size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of tiles of an image of ``size`` (height, width): one per 24 × 24 block."""
    return -(-size[0] // IMAGE_SIZE), -(-size[1] // IMAGE_SIZE)


def tile_count(size: tuple[int, int]) -> int:
    """Tiles of an image, with the thumbnail that goes with more than one."""
    rows, columns = tile_grid(size)
    return rows * columns + (rows * columns > 1)


class TilePrompts(PromptMaker):
    """Families whose ``pixel_values`` are [all tiles, 3, 24, 24] in reading order; which tiles are
    one image is in the prompt alone. A tile is 3 × 3 tokens."""

    sizes = ((24, 24), (24, 48), (48, 48))

    def per_tile(self, model: Any) -> int:
        """Placeholders of one tile."""
        return 9

    def layout(self, size: tuple[int, int], tile: list[int]) -> list[int]:
        """Prompt tokens of an image; ``tile``: the placeholders of one tile."""
        raise NotImplementedError

    def image(self, model: Any, size: tuple[int, int], generator: torch.Generator) -> Piece:
        ids = self.layout(size, [IMAGE_TOKEN] * self.per_tile(model))
        pixels = torch.randn(tile_count(size), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        return Placed(ids, [0] * len(ids), {"pixel_values": pixels})

    def collate(self, images: Sequence[Piece], videos: Sequence[Piece]) -> dict[str, Tensor]:
        placed = [p for p in (*images, *videos) if isinstance(p, Placed)]
        placed.sort(key=lambda piece: piece.number)
        return {"pixel_values": torch.cat([p.inputs["pixel_values"] for p in placed])}

    def cut(
        self, inputs: dict[str, Tensor], row: int, images: slice, videos: slice
    ) -> dict[str, Tensor]:
        here = (inputs["input_ids"] == IMAGE_TOKEN).sum(-1)
        tiles = here // (int(here.sum()) // len(inputs["pixel_values"]))
        start = int(tiles[:row].sum())
        return {"pixel_values": inputs["pixel_values"][start : start + int(tiles[row])]}
