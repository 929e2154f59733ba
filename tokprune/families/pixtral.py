"""Mistral 3, and LLaVA checkpoints with a Pixtral tower: images of any size, a break after rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tokprune.engine.family import Family
from tokprune.engine.model import ImageLayout, ModelFacts, ObservedTower, Parts, TowerFacts
from tokprune.engine.pieces import Piece
from tokprune.families.base import decoder_facts, decoder_parts, feature_layer
from tokprune.families.grids import PACKED, image_of, raster_mean, whole_frames
from tokprune.families.pieces import cut_rows


class Mistral3(Family):
    """``Mistral3ForConditionalGeneration``: 2×2 patches become a token; a break token after every
    row, an end token after the last. Both are text: they stay and are not counted."""

    name = "mistral3"
    model_classes: tuple[str, ...] = ("Mistral3ForConditionalGeneration",)

    def parts(self, model: Any) -> Parts:
        inner = model.model
        tower = inner.vision_tower
        parts = decoder_parts(
            inner, inner.language_model, model.config.image_token_id, encoder=tower
        )
        attentions = [block.attention for block in tower.transformer.layers]
        return replace(parts, observed=ObservedTower(tower, attentions, packed=True))

    def facts(self, model: nn.Module, parts: Parts) -> ModelFacts:
        merge = _merge(parts)
        reason = PACKED.format(m=merge) if merge > 1 else PACKED.partition(" and merges")[0]
        config = parts.multimodal.config
        depth = len(parts.encoder.transformer.layers)
        layer = feature_layer(config.vision_feature_layer, depth)
        tower = TowerFacts(depth, layer, (0, 0), 0, False, False, merges=merge)
        return decoder_facts(self.name, parts, observed=tower, no_tower=reason)

    def images(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        patch, merge = parts.multimodal.config.vision_config.patch_size, _merge(parts)
        sizes = torch.as_tensor(call["image_sizes"]).tolist()
        return [
            image_of(
                h // patch // merge, w // patch // merge, broken=True, size=(h, w),
                segments=whole_frames(1, h // patch, w // patch),
                mean=partial(
                    raster_mean, merge=merge, height=h // patch // merge * merge,
                    width=w // patch // merge * merge,
                ),
            )
            for h, w in sizes
        ]  # fmt: skip

    def pieces(self, call: Mapping[str, Any], images: Any, most: int, video: bool) -> list[Piece]:
        return cut_rows(call, images, most, [self.pixels, "image_sizes"])


class LlavaPixtral(Mistral3):
    """``LlavaForConditionalGeneration`` with a Pixtral tower (Pixtral-12B): one token a patch."""

    name = "llava-pixtral"
    model_classes = ()


def _merge(parts: Parts) -> int:
    return int(getattr(parts.multimodal.config, "spatial_merge_size", 1))
