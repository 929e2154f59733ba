"""LLaVA-1.5: one tile per image, its patches in raster order, no newline tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tokprune.engine.family import Family
from tokprune.engine.model import ImageLayout, ModelFacts, Parts
from tokprune.engine.pieces import Piece
from tokprune.families.base import LlavaShaped
from tokprune.families.pieces import cut_rows
from tokprune.families.pixtral import LlavaPixtral


class Llava(LlavaShaped):
    """``LlavaForConditionalGeneration`` with a CLIP or SigLIP tower."""

    name = "llava-1.5"
    model_classes = ("LlavaForConditionalGeneration",)

    def of(self, model: nn.Module) -> Family:
        config: Any = model.config
        return LlavaPixtral() if config.vision_config.model_type == "pixtral" else self

    def images(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        assert facts.tower is not None
        packed = torch.arange(facts.tower.tokens_per_tile)
        return [ImageLayout(packed, 1)] * call[self.pixels].shape[0]

    def pieces(self, call: Mapping[str, Any], images: Any, most: int, video: bool) -> list[Piece]:
        return cut_rows(call, images, most, [self.pixels])
