"""LLaVA-NeXT-Video: images as in LLaVA-NeXT; frames pooled before the projector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from tokprune.engine.model import ImageLayout, ModelFacts, Parts
from tokprune.engine.pieces import Piece
from tokprune.families.base import with_videos
from tokprune.families.llava_next import LlavaNext
from tokprune.families.pieces import cut_frames
from tokprune.families.resampling import frames_of, pooled_video


class LlavaNextVideo(LlavaNext):
    """``LlavaNextVideoForConditionalGeneration``: every frame of a video is one tile, whose grid
    the ``vision_resampler`` pools by windows (mean, maximum or convolution); no newline tokens."""

    name = "llava-next-video"
    model_classes = ("LlavaNextVideoForConditionalGeneration",)

    def parts(self, model: nn.Module) -> Parts:
        parts = super().parts(model)
        assert parts.tower is not None
        return replace(
            parts,
            video_token_id=parts.multimodal.config.video_token_id,
            tower=replace(parts.tower, resampler=parts.multimodal.vision_resampler),
        )

    def facts(self, model: nn.Module, parts: Parts) -> ModelFacts:
        facts = super().facts(model, parts)
        stride = _stride(parts)
        assert facts.tower is not None
        small = (facts.tower.grid[0] // stride, facts.tower.grid[1] // stride)
        return with_videos(facts, parts, small)

    def videos(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        assert facts.frame_grid is not None
        assert facts.tower is not None
        videos, frames = frames_of(call[self.video_pixels])
        grid = facts.tower.grid
        layout = pooled_video(frames, grid, facts.frame_grid, _stride(parts), newline=False)
        return [layout] * videos

    def pieces(self, call: Mapping[str, Any], images: Any, most: int, video: bool) -> list[Piece]:
        if video:
            return cut_frames(call, images, most, self.video_pixels)
        return super().pieces(call, images, most, video)


def _stride(parts: Parts) -> int:
    config: Any = parts.multimodal.config
    return int(config.spatial_pool_stride)
