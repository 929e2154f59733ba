"""Models that know of their images the tiles alone: InternVL, SmolVLM, Idefics3, Aya, Cohere2."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from tokprune.engine.family import Family
from tokprune.engine.model import ModelFacts, ObservedTower, Parts, Segments, Tiles, TowerFacts
from tokprune.engine.pieces import Piece
from tokprune.families.base import decoder_facts, decoder_parts, encoder_layers_of, feature_layer
from tokprune.families.grids import raster_mean
from tokprune.families.pieces import cut_rows


class TiledFamily(Family):
    """Tiles of one size, of whose patches the model merges some to a token each. Every run of
    placeholders is an image; where text stands between the tiles of one, a tile is an image of its
    own, and ``keep`` counts per tile."""

    #: text stands between tiles
    per_tile = True
    #: rows of the encoder beside the patches
    class_tokens = 0

    def parts(self, model: Any) -> Parts:
        inner = model.model
        return decoder_parts(
            inner, inner.language_model, model.config.image_token_id, encoder=inner.vision_tower
        )

    @abstractmethod
    def merge(self, config: Any) -> int:
        """Patches that become a token, each way."""

    def facts(self, model: Any, parts: Parts) -> ModelFacts:
        m, side = self.merge(model.config), _patches(model.config)
        reason = f"the model makes one token of {m}×{m} patches after its vision encoder"
        tower = None
        if parts.observed is not None:
            layers, cls = len(parts.observed.attentions), bool(self.class_tokens)
            layer = feature_layer(getattr(model.config, "vision_feature_layer", -1), layers)
            tower = TowerFacts(layers, layer, (side, side), side * side, cls, False, merges=m)
        return decoder_facts(
            self.name, parts, observed=tower, no_tower=reason, per_tile=self.per_tile
        )

    def images(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> Tiles:
        config = parts.multimodal.config
        merge, side = self.merge(config), _patches(config)
        rows = (side * side + self.class_tokens,)
        grid, mean = (
            (side // merge, side // merge),
            partial(raster_mean, merge=merge, height=side, width=side),
        )
        return Tiles(grid, self.count(call[self.pixels]), Segments(rows, rows), mean)

    def count(self, pixels: Any) -> int | None:
        """Tiles of a call."""
        return int(pixels.shape[0])


def _patches(config: Any) -> int:
    """Patches along a side of a tile."""
    vision = config.vision_config
    image, patch = (
        x[0] if isinstance(x, list | tuple) else x for x in (vision.image_size, vision.patch_size)
    )
    return int(image // patch)


class InternVL(TiledFamily):
    """``InternVLForConditionalGeneration`` (2.5, 3, 3.5): the tiles of an image, its thumbnail
    last, stand in one run; frames of a video are images of one tile."""

    name = "internvl"
    model_classes = ("InternVLForConditionalGeneration",)
    per_tile = False
    class_tokens = 1

    def parts(self, model: Any) -> Parts:
        parts = super().parts(model)
        attentions = [block.attention for block in parts.encoder.encoder.layer]
        return replace(parts, observed=ObservedTower(parts.encoder, attentions))

    def merge(self, config: Any) -> int:
        return round(1 / config.downsample_ratio)

    def pieces(self, call: Mapping[str, Any], images: Any, most: int, video: bool) -> list[Piece]:
        return cut_rows(call, images, most, [self.pixels])


class SmolVLM(TiledFamily):
    """``SmolVLMForConditionalGeneration`` and ``Idefics3ForConditionalGeneration``."""

    name = "smolvlm"
    model_classes = ("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration")

    def parts(self, model: Any) -> Parts:
        inner = model.model
        tower = inner.vision_model
        parts = decoder_parts(inner, inner.text_model, model.config.image_token_id, encoder=tower)
        attentions = [block.self_attn for block in tower.encoder.layers]
        return replace(parts, observed=ObservedTower(tower, attentions))

    def merge(self, config: Any) -> int:
        return int(config.scale_factor)

    def count(self, pixels: Any) -> int | None:
        return None  # tiles of zeros are padding, which the values alone tell


class CohereVision(TiledFamily):
    """``AyaVisionForConditionalGeneration``, ``Cohere2VisionForConditionalGeneration``."""

    name = "cohere-vision"
    model_classes = ("AyaVisionForConditionalGeneration", "Cohere2VisionForConditionalGeneration")

    def parts(self, model: Any) -> Parts:
        parts = super().parts(model)
        attentions = [block.self_attn for block in encoder_layers_of(parts.encoder)]
        return replace(parts, observed=ObservedTower(parts.encoder, attentions))

    def merge(self, config: Any) -> int:
        return int(config.downsample_factor)

    def pieces(self, call: Mapping[str, Any], images: Any, most: int, video: bool) -> list[Piece]:
        return cut_rows(call, images, most, [self.pixels])
