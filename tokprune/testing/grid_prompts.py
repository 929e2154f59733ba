"""Prompts of models that take patches in one packed sequence and a grid per image or video."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

from tokprune.testing.pieces import Piece, PromptMaker

#: whether this release of transformers types the tokens of a prompt (5.x does)
TYPED = (
    "mm_token_type_ids"
    in inspect.signature(transformers.Qwen2VLForConditionalGeneration.forward).parameters
)

#: names of the pixels and of their grids, of images and of videos
_NAMES = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))


class GridMaker(PromptMaker):
    """Prompts of models that take packed patches, and a grid (t, h, w) in patches per image or
    video; here an image or a whole video is one run of placeholders between two markers."""

    types: ClassVar[str | None] = "mm_token_type_ids" if TYPED else None
    sizes: ClassVar[Sequence[tuple[int, int]]] = ((24, 40), (40, 24), (32, 32), (16, 48))
    #: (height, width) of all frames, in pixels
    frame: ClassVar[tuple[int, int]] = (16, 24)

    def markers(self, model: Any) -> tuple[int, int]:
        """Ids of the tokens before and after a run of placeholders."""
        return model.config.vision_start_token_id, model.config.vision_end_token_id

    def image(self, model: Any, size: tuple[int, int], generator: torch.Generator) -> Piece:
        grid = self.grid(model, 1, size)
        ids, types = self.run(model, model.config.image_token_id, 1, self.cells(model, grid))
        return Piece(ids, types, self.pixels(model, grid, generator))

    def video(self, model: Any, frames: int, generator: torch.Generator) -> Piece:
        grid = self.grid(model, frames, self.frame)
        ids, types = self.run(model, model.config.video_token_id, 2, self.cells(model, grid))
        return Piece(ids, types, self.pixels(model, grid, generator))

    def collate(self, images: Sequence[Piece], videos: Sequence[Piece]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for pieces, values, grid in ((images, *_NAMES[0]), (videos, *_NAMES[1])):
            if pieces:
                out[values] = torch.cat([piece.inputs["pixels"] for piece in pieces])
                out[grid] = torch.stack([piece.inputs["grid"] for piece in pieces])
        return out

    def cut(
        self, inputs: dict[str, Tensor], row: int, images: slice, videos: slice
    ) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for some, values, grid in ((images, *_NAMES[0]), (videos, *_NAMES[1])):
            if some.start < some.stop:
                counts = inputs[grid].prod(-1)
                begin, end = int(counts[: some.start].sum()), int(counts[: some.stop].sum())
                out[values], out[grid] = inputs[values][begin:end], inputs[grid][some]
        return out

    # ------------------------------------------------------------------------ its parts

    def grid(self, model: Any, frames: int, size: tuple[int, int]) -> Tensor:
        """(t, h, w) in patches for frames of ``size`` pixels, rounded to whole cells: [3]."""
        vision = model.config.vision_config
        merge = vision.spatial_merge_size
        h, w = (max(1, round(side / (vision.patch_size * merge))) * merge for side in size)
        return torch.tensor([-(-frames // vision.temporal_patch_size), h, w])

    def cells(self, model: Any, grid: Tensor) -> int:
        """Visual tokens of a grid, all frames together."""
        return int(grid.prod()) // model.config.vision_config.spatial_merge_size**2

    def run(self, model: Any, token: int, kind: int, count: int) -> tuple[list[int], list[int]]:
        """``count`` placeholders between markers, and the types of all these tokens."""
        start, end = self.markers(model)
        return [start, *[token] * count, end], [0, *[kind] * count, 0]

    def pixels(self, model: Any, grid: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """``pixels`` [t · h · w, 3 · 2 · patch²], random; ``grid`` [3]."""
        vision = model.config.vision_config
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(int(grid.prod()), width, generator=generator)
        return {"pixels": pixels, "grid": grid}


class TimedMaker(GridMaker):
    """Prompts of Qwen2.5-VL, which is told how many seconds a frame of a video's grid lasts."""

    def video(self, model: Any, frames: int, generator: torch.Generator) -> Piece:
        piece = super().video(model, frames, generator)
        piece.inputs["seconds"] = torch.randint(1, 4, (), generator=generator) / 2
        return piece

    def collate(self, images: Sequence[Piece], videos: Sequence[Piece]) -> dict[str, Tensor]:
        out = super().collate(images, videos)
        if videos:
            out["second_per_grid_ts"] = torch.stack([piece.inputs["seconds"] for piece in videos])
        return out

    def cut(
        self, inputs: dict[str, Tensor], row: int, images: slice, videos: slice
    ) -> dict[str, Tensor]:
        out = super().cut(inputs, row, images, videos)
        if videos.start < videos.stop:
            out["second_per_grid_ts"] = inputs["second_per_grid_ts"][videos]
        return out


class IslandMaker(GridMaker):
    """Prompts of Qwen3-VL and 3.5: every frame of a video is a run of its own, in markers of its
    own, after words that tell its time; the grid counts the video once."""

    def video(self, model: Any, frames: int, generator: torch.Generator) -> Piece:
        grid = self.grid(model, frames, self.frame)
        t = int(grid[0])
        ids: list[int] = []
        types: list[int] = []
        for _ in range(t):
            words = int(torch.randint(2, 5, (), generator=generator))
            ids += torch.randint(3, 90, (words,), generator=generator).tolist()
            types += [0] * words
            run = self.run(model, model.config.video_token_id, 2, self.cells(model, grid) // t)
            ids += run[0]
            types += run[1]
        if TYPED:  # processors of 5.x leave the markers of the chat template around it all
            start, end = self.markers(model)
            ids, types = [start, *ids, end], [0, *types, 0]
        return Piece(ids, types, self.pixels(model, grid, generator))
