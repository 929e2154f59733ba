"""LLaVA-NeXT: a base tile and a grid of crops, stitched, unpadded, a newline token per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)

from tokprune.engine.model import ImageLayout, ModelFacts, Parts
from tokprune.engine.pieces import Piece
from tokprune.families.base import LlavaShaped
from tokprune.families.pieces import cut_tiles


class LlavaNext(LlavaShaped):
    """``LlavaNextForConditionalGeneration`` with a CLIP or SigLIP tower."""

    name = "llava-next"
    model_classes = ("LlavaNextForConditionalGeneration",)
    tiled = True

    def newline(self, parts: Parts) -> Tensor | None:
        return parts.multimodal.image_newline  # type: ignore[return-value]

    def max_tiles(self, model: nn.Module) -> int:
        config: Any = model.config
        side = config.vision_config.image_size
        return 1 + max((h // side) * (w // side) for h, w in config.image_grid_pinpoints)

    def images(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        multimodal: Any = parts.multimodal
        assert facts.tower is not None
        config, per_tile = multimodal.config, facts.tower.tokens_per_tile
        side = config.vision_config.image_size
        image_sizes = torch.as_tensor(call["image_sizes"]).tolist()
        sizes = [tuple(int(v) for v in size) for size in image_sizes]
        layouts = []
        for size in sizes:
            tiles = image_size_to_num_patches(list(size), config.image_grid_pinpoints, side)
            # The model's own packing, run on numbers instead of features, says where each
            # feature goes; newline tokens come out as −1.
            numbers = torch.arange(tiles * per_tile)
            packed, _ = multimodal.pack_image_features(
                [numbers.view(tiles, per_tile, 1)],
                [list(size)],
                vision_feature_select_strategy=config.vision_feature_select_strategy,
                image_newline=torch.tensor([-1]),
            )
            down, across = get_anyres_image_grid_shape(
                list(size), config.image_grid_pinpoints, side
            )
            grid = (down, across) if tiles > 1 else (0, 0)
            layouts.append(ImageLayout(packed[0].view(-1), tiles, (size[0], size[1]), grid))
        return layouts

    def pieces(self, call: Mapping[str, Any], images: Any, most: int, video: bool) -> list[Piece]:
        runs = [(0, len(images))]
        return cut_tiles(call, images, most, self.pixels, ["image_sizes"], runs)
