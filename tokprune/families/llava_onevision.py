"""LLaVA-OneVision: a single image in tiles, several images whole, videos with pooled frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
)

from tokprune.engine.compat import RELEASE
from tokprune.engine.model import ImageLayout, ModelFacts, Parts, TowerFacts
from tokprune.engine.pieces import Piece
from tokprune.families.base import with_videos
from tokprune.families.llava_next import LlavaNext
from tokprune.families.pieces import cut_frames, cut_tiles
from tokprune.families.resampling import frames_of, pooled_video, shrunk_map
from tokprune.operators.anyres import stitched_bounds

#: the stitched crops are interpolated where they are larger than allowed by more than this
_TOLERANCE = 1.1


class LlavaOnevision(LlavaNext):
    """``LlavaOnevisionForConditionalGeneration`` with a SigLIP (or CLIP) tower.

    The image of a prompt that has one is cut into tiles, as in LLaVA-NeXT; where its stitched,
    unpadded crops come to more than the cells of ``vision_aspect_ratio`` ("anyres_max_9": nine
    tiles), the model shrinks them by interpolation. Every image of a prompt with several
    (``batch_num_images``) is one tile and one newline token. Every frame of a video is one tile,
    whose projected grid is halved by interpolation; one newline token ends the video.
    """

    name = "llava-onevision"
    model_classes = ("LlavaOnevisionForConditionalGeneration",)

    def parts(self, model: nn.Module) -> Parts:
        parts = super().parts(model)
        return replace(parts, video_token_id=parts.multimodal.config.video_token_id)

    def facts(self, model: nn.Module, parts: Parts) -> ModelFacts:
        facts = super().facts(model, parts)
        assert facts.tower is not None
        height, width = facts.tower.grid
        return with_videos(facts, parts, (math.ceil(height / 2), math.ceil(width / 2)))

    def images(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        assert facts.tower is not None
        tower, batch_num_images = facts.tower, call.get("batch_num_images")
        sizes = [(int(h), int(w)) for h, w in torch.as_tensor(call["image_sizes"]).tolist()]
        alone = [True] * len(sizes)
        if batch_num_images is not None:
            counts = torch.as_tensor(batch_num_images).tolist()
            alone = [n == 1 for n in counts for _ in range(int(n))]
        layouts = []
        for size, tiled in zip(sizes, alone):
            if tiled:
                layouts.append(_tiles(parts, size, tower))
            else:
                packed = torch.cat([torch.arange(tower.tokens_per_tile), torch.tensor([-1])])
                layouts.append(ImageLayout(packed, 1, size))
        return layouts

    def videos(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        assert facts.frame_grid is not None
        assert facts.tower is not None
        videos, frames = frames_of(call[self.video_pixels])
        grid = facts.tower.grid
        return [pooled_video(frames, grid, facts.frame_grid, None, newline=True)] * videos

    def pieces(self, call: Mapping[str, Any], images: Any, most: int, video: bool) -> list[Piece]:
        if video:
            return cut_frames(call, images, most, self.video_pixels)
        name = "batch_num_images"
        if call.get(name) is None:  # every image is in tiles
            return super().pieces(call, images, most, video)
        # the model asks of every image whether it is its prompt's only one, and gets pieces in
        # which all are, or none
        tiled = [image.tile_grid != (0, 0) for image in images]
        edges = [0, *(i for i in range(1, len(tiled)) if tiled[i] != tiled[i - 1]), len(tiled)]
        found = cut_tiles(call, images, most, self.pixels, ["image_sizes"], [*pairwise(edges)])
        for piece in found:
            number = len(piece.changes["image_sizes"])
            counts = [1] * number if tiled[piece.first] else [max(2, number)]
            piece.changes[name] = torch.tensor(counts)
        return found

    def joined(self, results: Sequence[Any], pieces: Sequence[Piece], video: bool) -> Any:
        if video and RELEASE >= (5, 0):
            # the model ends every piece with a newline token: that of a video's last one stays
            for i, result in enumerate(results[:-1]):
                if pieces[i + 1].continues:
                    result.pooler_output = result.pooler_output[:, :-1]
        return super().joined(results, pieces, video)


def _tiles(parts: Parts, size: tuple[int, int], facts: TowerFacts) -> ImageLayout:
    """An image in tiles: base, then the stitched and unpadded crops with a newline per row."""
    config: Any = parts.multimodal.config
    down, across = get_anyres_image_grid_shape(
        list(size), config.image_grid_pinpoints, config.vision_config.image_size
    )
    (height, width), cells = facts.grid, facts.patches
    bounds = stitched_bounds(facts.grid, (down, across), size)
    rows, columns = bounds[1] - bounds[0], bounds[3] - bounds[2]
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (most * height**2))
    token_grid = None
    if ratio > _TOLERANCE:
        rows, columns = int(rows // ratio), int(columns // ratio)
        token_grid = shrunk_map(facts.grid, (down, across), bounds, (rows, columns))
        crops = cells + torch.arange(rows * columns).view(rows, columns)
    else:
        numbers = cells + torch.arange(down * across * cells)
        stitched = numbers.view(down, across, height, width).transpose(1, 2)
        stitched = stitched.reshape(down * height, across * width)
        crops = stitched[bounds[0] : bounds[1], bounds[2] : bounds[3]]
    crops = torch.cat([crops, torch.full((rows, 1), -1)], dim=1)
    packed = torch.cat([torch.arange(cells), crops.flatten()])
    return ImageLayout(packed, 1 + down * across, size, (down, across), token_grid=token_grid)
