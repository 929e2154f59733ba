"""Video-LLaVA: one tower for images, one for videos, whose frames keep their class tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tokprune.engine.compat import RELEASE
from tokprune.engine.family import Family
from tokprune.engine.model import ImageLayout, ModelFacts, Parts, Segments, TokenGrid
from tokprune.engine.pieces import Piece, joined
from tokprune.families.base import decoder_facts, decoder_parts
from tokprune.families.grids import image_of
from tokprune.families.pieces import cut_frames, cut_rows
from tokprune.families.resampling import frames_of


class VideoLlava(Family):
    """``VideoLlavaForConditionalGeneration``. Class tokens of frames have no place in a grid; they
    go as newline tokens do."""

    name = "video-llava"
    model_classes = ("VideoLlavaForConditionalGeneration",)
    pixels = "pixel_values" if RELEASE >= (5, 0) else "pixel_values_images"

    def parts(self, model: Any) -> Parts:
        inner, config = model.model, model.config
        return decoder_parts(
            inner, inner.language_model, config.image_token_id, config.video_token_id,
            encoder=inner.image_tower,
        )  # fmt: skip

    def facts(self, model: nn.Module, parts: Parts) -> ModelFacts:
        reason = "it has one vision tower for images and another for videos"
        return decoder_facts(self.name, parts, no_tower=reason)

    def images(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        side, rows = _side(parts)
        image = image_of(side, side, segments=Segments(rows, rows))
        return [image] * call[self.pixels].shape[0]

    def videos(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        side, rows = _side(parts)
        videos, frames = frames_of(call[self.video_pixels])
        cells = torch.arange(frames * side * side).view(frames, -1)
        packed = torch.cat([torch.full((frames, 1), -1), cells], dim=1).flatten()
        grids = TokenGrid(((side, side),) * frames)
        own = Segments(rows * frames, rows * frames)
        video = ImageLayout(
            packed, frames, frames=frames, video=True, token_grid=grids, segments=own
        )
        return [video] * videos

    def pieces(self, call: Mapping[str, Any], images: Any, most: int, video: bool) -> list[Piece]:
        if video:
            return cut_frames(call, images, most, self.video_pixels)
        return cut_rows(call, images, most, [self.pixels])

    def joined(self, results: Sequence[Any], pieces: Sequence[Piece], video: bool) -> Any:
        if video and RELEASE < (5, 0):  # features, and how many frames each video has
            features, numbers = zip(*results)
            ends = [*(not piece.continues for piece in pieces[1:]), True]
            total = sum(numbers[: ends.index(True) + 1])
            return joined(features, pieces, axis=0), total
        # features of videos are [frames, …]
        return joined(results, pieces, axis=0 if video else 1)


def _side(parts: Parts) -> tuple[int, tuple[int, ...]]:
    """Patches along a side, and rows of an image in the tower."""
    vision = parts.multimodal.config.vision_config
    side = vision.image_size // vision.patch_size
    return side, (side * side + 1,)
