"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5: images of any size, M-RoPE, videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tokprune.engine.compat import RELEASE
from tokprune.engine.family import Family
from tokprune.engine.model import (
    Deep,
    ImageLayout,
    ModelFacts,
    ObservedTower,
    Parts,
    TowerFacts,
)
from tokprune.engine.pieces import Piece, joined
from tokprune.families.base import decoder_facts, decoder_parts
from tokprune.families.grids import PACKED, SegmentsOf, grid_images, whole_frames, windowed_frames
from tokprune.families.pieces import cut_grid_frames, cut_grids


class Qwen2VL(Family):
    """``Qwen2VLForConditionalGeneration``: 2×2 patches become a token; rotary positions have three
    axes (time, height, width), which survivors keep by default."""

    name = "qwen2-vl"
    model_classes: tuple[str, ...] = ("Qwen2VLForConditionalGeneration",)
    #: text stands between the frames of a video
    broken_videos = False
    #: rows of the encoder may be dropped patch by patch
    drops = True

    def parts(self, model: Any) -> Parts:
        inner, config = model.model, model.config
        parts = decoder_parts(
            inner, inner.language_model, config.image_token_id, config.video_token_id, inner.visual
        )
        tower, blocks = inner.visual, tuple(inner.visual.blocks)
        observed = ObservedTower(
            tower, [block.attn for block in blocks], packed=True, raster=False, blocks=blocks,
            merger=tower.merger,
        )  # fmt: skip
        return replace(parts, observed=observed)

    def facts(self, model: nn.Module, parts: Parts) -> ModelFacts:
        merge, depth = _vision(parts).spatial_merge_size, len(parts.encoder.blocks)
        whole = self.whole_layers(parts)
        last = depth - 1 if whole is None else whole[-1]
        tower = TowerFacts(depth, last, (0, 0), 0, False, False, merges=merge, whole_layers=whole)
        reason = PACKED.format(m=merge)
        return decoder_facts(
            self.name, parts, axes=3, observed=tower, packed=self.drops, readable=True,
            no_tower=reason,
        )  # fmt: skip

    def whole_layers(self, parts: Parts) -> tuple[int, ...] | None:
        """The encoder layers that see whole frames; None: all."""
        return None

    def window(self, parts: Parts) -> int | None:
        """Cells each way of the windows that the encoder moves its rows to."""
        return None

    def segments(self, parts: Parts) -> SegmentsOf:
        """What attends to each other in the encoder."""
        return whole_frames

    def images(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        merge = _vision(parts).spatial_merge_size
        segments, window = self.segments(parts), self.window(parts)
        return grid_images(call["image_grid_thw"], merge, segments, window=window)

    def videos(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        merge, broken = _vision(parts).spatial_merge_size, self.broken_videos
        segments, window = self.segments(parts), self.window(parts)
        return grid_images(call["video_grid_thw"], merge, segments, True, broken, window)

    def pieces(self, call: Mapping[str, Any], images: Any, most: int, video: bool) -> list[Piece]:
        if video:
            return cut_grid_frames(call, images, most, self.video_pixels, "video_grid_thw")
        return cut_grids(call, images, most, self.pixels, "image_grid_thw")


class Qwen25VL(Qwen2VL):
    """``Qwen2_5_VLForConditionalGeneration``: most blocks of its encoder see windows."""

    name = "qwen2.5-vl"
    model_classes = ("Qwen2_5_VLForConditionalGeneration",)
    drops = False

    def segments(self, parts: Parts) -> SegmentsOf:
        return windowed_frames(self.window(parts) * _vision(parts).spatial_merge_size)

    def window(self, parts: Parts) -> int:
        config = _vision(parts)
        return int(config.window_size // config.spatial_merge_size // config.patch_size)

    def whole_layers(self, parts: Parts) -> tuple[int, ...]:
        return tuple(sorted(int(layer) for layer in _vision(parts).fullatt_block_indexes))


class Qwen3VL(Qwen2VL):
    """``Qwen3VLForConditionalGeneration`` and the MoE: features of inner encoder layers are added
    after the first decoder layers (deepstack); text stands between the frames of a video."""

    name = "qwen3-vl"
    model_classes = ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration")
    broken_videos = True
    drops = False

    def deep(self, kwargs: dict[str, Any], first_drop: int) -> list[Deep]:
        layers, mask = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
        if layers is None or mask is None or first_drop >= len(layers):
            return []
        kwargs["deepstack_visual_embeds"] = kwargs["visual_pos_masks"] = None
        row = torch.where(mask, (mask.flatten().cumsum(0) - 1).view(mask.shape), -1)
        return [Deep(n, values, row.to(values.device)) for n, values in enumerate(layers)]

    def joined(self, results: Sequence[Any], pieces: Sequence[Piece], video: bool) -> Any:
        if RELEASE < (5, 0):  # features by image, and those of inner layers for all images [n, D]
            features, deep = zip(*results)
            return joined(features, pieces), [torch.cat(layer) for layer in zip(*deep)]
        whole = joined(results, pieces)
        layers = zip(*(result.deepstack_features for result in results))
        whole.deepstack_features = [joined(layer, pieces) for layer in layers]
        return whole


class Qwen35(Qwen2VL):
    """``Qwen3_5ForConditionalGeneration`` and the MoE. Three of four decoder layers are linear
    attention, whose state has no keys that could be hidden: a token that is dropped leaves their
    recurrence. The promise there is the layer, run on the shorter sequence at the original
    positions; for the attention layers that is what it is everywhere."""

    name = "qwen3.5"
    model_classes = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
    broken_videos = True
    drops = False


def _vision(parts: Parts) -> Any:
    return parts.multimodal.config.vision_config
