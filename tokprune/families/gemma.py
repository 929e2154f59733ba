"""Gemma 3, Gemma 4 and PaliGemma: images whose tokens see each other both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tokprune.engine.compat import RELEASE
from tokprune.engine.family import Family
from tokprune.engine.model import (
    ImageLayout,
    ModelFacts,
    ObservedTower,
    Parts,
    Segments,
    Tower,
    TowerFacts,
)
from tokprune.engine.pieces import Piece
from tokprune.errors import UnsupportedModelError
from tokprune.families.base import (
    decoder_blocks,
    decoder_facts,
    decoder_parts,
    encoder_layers_of,
    tower_facts,
)
from tokprune.families.grids import image_of, raster_mean, whole_frames
from tokprune.families.pieces import cut_rows


class Gemma3(Family):
    """``Gemma3ForConditionalGeneration``: every image, and every crop of pan-and-scan, is a square
    of as many tokens (256), each an average of 4×4 patches."""

    name = "gemma3"
    model_classes = ("Gemma3ForConditionalGeneration",)
    drops_blocks_under_flash = True

    def parts(self, model: Any) -> Parts:
        inner = model.model
        parts = decoder_parts(
            inner, inner.language_model, model.config.image_token_id, encoder=inner.vision_tower
        )
        attentions = [block.self_attn for block in encoder_layers_of(inner.vision_tower)]
        return replace(parts, observed=ObservedTower(inner.vision_tower, attentions))

    def facts(self, model: Any, parts: Parts) -> ModelFacts:
        tokens, vision = model.config.mm_tokens_per_image, model.config.vision_config
        side, depth = vision.image_size // vision.patch_size, len(_attentions(parts))
        p = side // math.isqrt(tokens)
        reason = f"the model averages {p}×{p} patches to a token after its vision encoder"
        tower = TowerFacts(depth, depth - 1, (side, side), side**2, False, False, merges=p)
        return decoder_facts(self.name, parts, tokens, observed=tower, no_tower=reason)

    def images(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        side = math.isqrt(facts.max_visual_tokens)
        vision = parts.multimodal.config.vision_config
        patches = vision.image_size // vision.patch_size
        rows, mean = (
            (patches**2,),
            partial(raster_mean, merge=patches // side, height=patches, width=patches),
        )
        image = image_of(side, side, segments=Segments(rows, rows), mean=mean)
        return [image] * call[self.pixels].shape[0]

    def pieces(self, call: Mapping[str, Any], images: Any, most: int, video: bool) -> list[Piece]:
        return cut_rows(call, images, most, [self.pixels])


def _attentions(parts: Parts) -> list[Any]:
    return [] if parts.observed is None else parts.observed.attentions


class Gemma4(Family):
    """``Gemma4ForConditionalGeneration`` without per-layer inputs and shared keys: images of any
    shape, each token an average of k×k patches; text stands between the frames of a video."""

    name = "gemma4"
    model_classes = ("Gemma4ForConditionalGeneration",)

    def parts(self, model: Any) -> Parts:
        inner, text = model.model, model.config.text_config
        for option, what in (
            ("num_kv_shared_layers", "late layers read the keys that earlier layers left, so that "
             "layers cannot hold different tokens"),
            ("hidden_size_per_layer_input", "every layer takes inputs of its own for each token of "
             "the prompt"),
        ):  # fmt: skip
            if getattr(text, option, 0):
                raise UnsupportedModelError(
                    f"config.text_config.{option}={getattr(text, option)}: {what}; supported are "
                    "the Gemma 4 checkpoints that have neither"
                )
        config = model.config
        return decoder_parts(
            inner, inner.language_model, config.image_token_id, config.video_token_id,
            inner.vision_tower,
        )  # fmt: skip

    def facts(self, model: nn.Module, parts: Parts) -> ModelFacts:
        k = parts.multimodal.config.vision_config.pooling_kernel_size
        reason = f"the model averages {k}×{k} patches to a token in its vision encoder"
        return decoder_facts(self.name, parts, no_tower=reason)

    def images(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        return [_image(parts, w, h) for w, h in _grids(call["image_position_ids"])]

    def videos(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        grids, first, found = _grids(call["video_position_ids"]), 0, []
        for frames in torch.as_tensor(call["num_frames_per_video"]).tolist():
            w, h = grids[first]
            first += frames
            found.append(_image(parts, w, h, frames, video=True))
        return found

    def pieces(self, call: Mapping[str, Any], images: Any, most: int, video: bool) -> list[Piece]:
        if not video:
            return cut_rows(call, images, most, [self.pixels, "image_position_ids"])
        found, start = [], 0
        for number, own in enumerate(images):
            for part in own.parts(most):
                at = slice(start, start + part.frames)
                start = at.stop
                names = (self.video_pixels, "video_position_ids")
                changes = {name: call[name][at] for name in names}
                changes["num_frames_per_video"] = torch.tensor([part.frames])
                found.append(Piece(changes, [part], number, part.first_frame > 0))
        return found


def _grids(places: Any) -> list[list[int]]:
    """Patches (across, down) of every image, by the places (x, y) of its patches [n, most, 2]."""
    return (torch.as_tensor(places).amax(1) + 1).tolist()  # type: ignore[no-any-return]


def _image(parts: Parts, w: int, h: int, frames: int = 1, video: bool = False) -> ImageLayout:
    k = parts.multimodal.config.vision_config.pooling_kernel_size
    rows = whole_frames(frames, h, w)
    return image_of(h // k, w // k, frames, video, broken=video, segments=rows)


class PaliGemma(Family):
    """``PaliGemmaForConditionalGeneration`` 1 and 2: one tile, one token a patch; everything up to
    the answer sees everything."""

    name = "paligemma"
    model_classes = ("PaliGemmaForConditionalGeneration",)
    drops_blocks_under_flash = True

    def parts(self, model: Any) -> Parts:
        inner = model.model
        tower = inner.vision_tower
        return Parts(
            inner, inner.language_model, decoder_blocks(inner.language_model),
            model.config.image_token_id, encoder=tower,
            tower=Tower(
                tower,
                encoder_layers_of(tower),
                inner.multi_modal_projector,
                reads_output=True,
                scale=1.0 if RELEASE >= (5, 0) else model.config.text_config.hidden_size**-0.5,
            ),
        )  # fmt: skip

    def facts(self, model: Any, parts: Parts) -> ModelFacts:
        assert parts.tower is not None
        tower = tower_facts(parts.tower, model.config.vision_config, -1)
        return decoder_facts(self.name, parts, tower.patches, tower=tower)

    def images(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        assert facts.tower is not None
        return [ImageLayout(torch.arange(facts.tower.patches), 1)] * call[self.pixels].shape[0]

    def pieces(self, call: Mapping[str, Any], images: Any, most: int, video: bool) -> list[Piece]:
        return cut_rows(call, images, most, [self.pixels])
