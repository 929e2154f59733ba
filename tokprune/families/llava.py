"""LLaVA-1.5: one tile per image, its patches in raster order, no newline tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokprune.engine.model import ImageLayout, ModelFacts, Parts
from tokprune.families.base import LlavaShaped


class Llava(LlavaShaped):
    """``LlavaForConditionalGeneration`` with a CLIP or SigLIP tower."""

    name = "llava-1.5"
    model_classes = ("LlavaForConditionalGeneration",)

    def max_tiles(self, model: nn.Module) -> int:
        return 1

    def layouts(
        self, parts: Parts, pixel_values: Tensor, image_sizes: Any, facts: ModelFacts,
        batch_num_images: Any = None,
    ) -> list[ImageLayout]:  # fmt: skip
        packed = torch.arange(facts.tokens_per_tile)
        return [ImageLayout(packed, 1)] * pixel_values.shape[0]
