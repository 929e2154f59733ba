"""Tiny random models with a Pixtral tower, and prompts for them: Mistral 3, and LLaVA's class as
Pixtral checkpoints use it. Patches of 4 × 4 pixels; Mistral 3 merges 2 × 2 of them to a cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from tokprune.testing.pieces import Piece, PromptMaker
from tokprune.testing.tiny import IMAGE_TOKEN, Builder, randomise
from tokprune.testing.tiny_qwen import MERGE, PATCH, text_fields

#: text tokens after every row of an image, and after its last; configs do not know them
BREAK_TOKEN = 97
END_TOKEN = 96

_DECODERS = {"mistral": "MistralConfig", "ministral3": "Ministral3Config"}


def _tower() -> Any:
    """Config of a Pixtral tower of four blocks for images of up to 256 × 256 pixels."""
    return transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        image_size=256, patch_size=PATCH,
    )  # fmt: skip


def _text(decoder: str, layers: int, **changes: Any) -> Any:
    """Config of a decoder, ``"mistral"`` or ``"ministral3"``."""
    fields: dict[str, Any] = {"head_dim": 16, "sliding_window": None}
    if decoder == "ministral3":
        # queries are scaled by position from the eighth on, so that prompts of a test meet it
        fields["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    return getattr(transformers, _DECODERS[decoder])(**text_fields(layers, **{**fields, **changes}))


def mistral3(
    attention: str = "sdpa", seed: int = 0, layers: int = 6, decoder: str = "mistral",
    **changes: Any,
) -> Any:  # fmt: skip
    """Mistral 3. ``attention``: "eager", "sdpa"; ``decoder``: "mistral" or, where the release has
    it, "ministral3", whose queries grow with their position; ``changes``: of its config."""
    config = transformers.Mistral3Config(
        vision_config=_tower(), text_config=_text(decoder, layers, **changes),
        image_token_index=IMAGE_TOKEN, spatial_merge_size=MERGE, vision_feature_layer=-1,
        tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = attention
    return randomise(transformers.Mistral3ForConditionalGeneration(config), seed)


def llava_pixtral(attention: str = "sdpa", seed: int = 0, layers: int = 6, **changes: Any) -> Any:
    """LLaVA with a Pixtral tower and a Mistral decoder: every patch is a visual token."""
    config = transformers.LlavaConfig(
        vision_config=_tower(), text_config=_text("mistral", layers, **changes),
        image_token_index=IMAGE_TOKEN, vision_feature_layer=-1,
        vision_feature_select_strategy="full", tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = attention
    return randomise(transformers.LlavaForConditionalGeneration(config), seed)


class RowMaker(PromptMaker):
    """Prompts whose images are rows of placeholders with a text token after each."""

    sizes: ClassVar[Sequence[tuple[int, int]]] = ((24, 40), (40, 24), (32, 32), (16, 48))

    def image(self, model: Any, size: tuple[int, int], generator: torch.Generator) -> Piece:
        cell = model.config.vision_config.patch_size * getattr(
            model.config, "spatial_merge_size", 1
        )
        rows, columns = (max(1, round(side / cell)) for side in size)
        ids = ([IMAGE_TOKEN] * columns + [BREAK_TOKEN]) * rows
        ids[-1] = END_TOKEN
        pixels = torch.randn(3, rows * cell, columns * cell, generator=generator)
        return Piece(ids, [0] * len(ids), {"pixels": pixels})

    def collate(self, images: Sequence[Piece], videos: Sequence[Piece]) -> dict[str, Tensor]:
        """``pixel_values`` [n, 3, H, W], zeros to the right and below; ``image_sizes`` [n, 2]."""
        sizes = torch.tensor([piece.inputs["pixels"].shape[1:] for piece in images])
        high, wide = (int(side) for side in sizes.amax(0))
        pixels = [
            F.pad(p, (0, wide - p.shape[2], 0, high - p.shape[1]))
            for p in (piece.inputs["pixels"] for piece in images)
        ]
        return {"pixel_values": torch.stack(pixels), "image_sizes": sizes}

    def cut(
        self, inputs: dict[str, Tensor], row: int, images: slice, videos: slice
    ) -> dict[str, Tensor]:
        sizes = inputs["image_sizes"][images]
        high, wide = (int(side) for side in sizes.amax(0))
        return {
            "pixel_values": inputs["pixel_values"][images, :, :high, :wide],
            "image_sizes": sizes,
        }


#: builder and prompt maker of every family that the installed release has
FAMILIES: dict[str, tuple[Builder, PromptMaker]] = {
    "mistral3": (mistral3, RowMaker()),
    "llava-pixtral": (llava_pixtral, RowMaker()),
}
