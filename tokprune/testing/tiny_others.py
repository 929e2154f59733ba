"""Tiny random Video-LLaVA and LLaVA-1.5 with decoders of other kinds, and prompts for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from tokprune.testing.pieces import Piece, PromptMaker
from tokprune.testing.tiny import IMAGE_SIZE, IMAGE_TOKEN, PATCHES, VIDEO_TOKEN, vision_config
from tokprune.testing.tiny_prompts import StackedPrompts
from tokprune.testing.tiny_weights import assemble, decoder_config, has_decoder

#: what a decoder's config says beyond its sizes
_OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "phi3": {},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "sliding_window": 4096},
    "cohere": {"logit_scale": 1.0, "rope_theta": 10000.0},
    "stablelm": {},
    "glm4": {},
    "phi": {},
    "granite": {
        "attention_multiplier": 8**-0.5,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
    },
    "mistral": {"sliding_window": None},
}


def llava_with(
    decoder: str, attention: str = "sdpa", seed: int = 0, layers: int = 6, tower: str = "clip",
    window: int | None = None, **changes: Any,
) -> Any:  # fmt: skip
    """LLaVA-1.5 with another decoder: "qwen3", "phi3", "gemma2" (eager only), "cohere", "stablelm",
    "glm4", "phi", "granite" or "mistral". ``window``: tokens that sliding layers see back (all of
    Mistral, Phi-3; every other one of Gemma 2); ``changes``: of the decoder's config."""
    options = {**_OPTIONS[decoder], **({"sliding_window": window} if window else {}), **changes}
    config = transformers.LlavaConfig(
        vision_config=vision_config(tower, 4),
        text_config=decoder_config(decoder, layers, **options),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        tie_word_embeddings=False,
    )
    return assemble("Llava", config, attention, seed)


class LlavaPrompts(StackedPrompts):
    """Images [3, 24, 24] of 36 placeholders."""

    def layout(self, model: Any) -> list[int]:
        return [IMAGE_TOKEN] * PATCHES


def video_llava(attention: str = "sdpa", seed: int = 0, layers: int = 6, **changes: Any) -> Any:
    """Video-LLaVA: a tower for images, another for frames, a Llama decoder."""
    config = transformers.VideoLlavaConfig(
        vision_config=vision_config("clip", 4),
        text_config=decoder_config("llama", layers, **changes),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_seq_length=PATCHES,
        video_seq_length=8 * (PATCHES + 1),
        tie_word_embeddings=False,
    )
    return assemble("VideoLlava", config, attention, seed)


class VideoLlavaPrompts(PromptMaker):
    """Images of 36 placeholders; videos [frames, 3, 24, 24] of 37 of their own a frame, since a
    frame keeps its class token, in one run."""

    def image(self, model: Any, size: tuple[int, int], generator: torch.Generator) -> Piece:
        pixels = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        return Piece([IMAGE_TOKEN] * PATCHES, [0] * PATCHES, {_pixels(): pixels})

    def video(self, model: Any, frames: int, generator: torch.Generator) -> Piece:
        pixels = torch.randn(frames, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        ids = [VIDEO_TOKEN] * (frames * (PATCHES + 1))
        return Piece(ids, [0] * len(ids), {"pixel_values_videos": pixels})

    def collate(self, images: Sequence[Piece], videos: Sequence[Piece]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, pieces in ((_pixels(), images), ("pixel_values_videos", videos)):
            if pieces:
                out[name] = torch.stack([piece.inputs[name] for piece in pieces])
        return out

    def cut(
        self, inputs: dict[str, Tensor], row: int, images: slice, videos: slice
    ) -> dict[str, Tensor]:
        parts = ((_pixels(), images), ("pixel_values_videos", videos))
        return {name: inputs[name][part] for name, part in parts if part.start < part.stop}


def _pixels() -> str:
    """Name of the input for images: transformers 5 renamed it."""
    known = inspect.signature(transformers.VideoLlavaForConditionalGeneration.forward).parameters
    return "pixel_values" if "pixel_values" in known else "pixel_values_images"


FAMILIES: dict[str, tuple[Callable[..., Any], PromptMaker]] = {
    "video-llava": (video_llava, VideoLlavaPrompts()),
    **{
        f"llava-1.5/{decoder}": (
            partial(llava_with, decoder, attention="eager" if decoder == "gemma2" else "sdpa"),
            LlavaPrompts(),
        )
        for decoder in _OPTIONS
        if has_decoder(decoder)
    },
}
