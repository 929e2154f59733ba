"""Tiny random models that cut images into tiles, each a run of placeholders, and prompts for them:
InternVL, SmolVLM, Idefics3, Aya Vision, Cohere2 Vision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokprune.testing.pieces import Piece, PromptMaker
from tokprune.testing.tiny import IMAGE_SIZE, IMAGE_TOKEN, vision_config
from tokprune.testing.tiny_prompts import (
    AROUND_TOKEN,
    BEGIN_TOKEN,
    BREAK,
    END_TOKEN,
    GLOBAL_TOKEN,
    Placed,
    TilePrompts,
    tile_count,
    tile_grid,
)
from tokprune.testing.tiny_weights import assemble, decoder_config

# ------------------------------------------------------------------------------- InternVL


def internvl(
    attention: str = "sdpa", seed: int = 0, layers: int = 6, decoder: str = "qwen2",
    **changes: Any,
) -> Any:  # fmt: skip
    """InternVL: a tower with a class token and layer scale, 2 × 2 patches shuffled into a token.
    ``decoder``: "qwen2" or "qwen3"; ``changes``: of its config (so for all builders here)."""
    vision = transformers.InternVLVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        image_size=[IMAGE_SIZE, IMAGE_SIZE], patch_size=[4, 4],
    )  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=decoder_config(decoder, layers, **changes),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=9,
        tie_word_embeddings=False,
    )
    return assemble("InternVL", config, attention, seed)


class InternVLPrompts(TilePrompts):
    """All tiles of an image in one run between begin and end; the frames of a video are images of
    one tile with words before and line breaks between them, and share ``pixel_values``."""

    def layout(self, size: tuple[int, int], tile: list[int]) -> list[int]:
        return [BEGIN_TOKEN, *tile * tile_count(size), END_TOKEN]

    def video(self, model: Any, frames: int, generator: torch.Generator) -> Piece:
        ids: list[int] = []
        for frame in range(frames):
            ids += [*([BREAK] if frame else []), 14, 15 + frame]
            ids += [BEGIN_TOKEN, *[IMAGE_TOKEN] * self.per_tile(model), END_TOKEN]
        pixels = torch.randn(frames, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        return Placed(ids, [0] * len(ids), {"pixel_values": pixels})


# --------------------------------------------------------------------- SmolVLM, Idefics3


def smolvlm(attention: str = "sdpa", seed: int = 0, layers: int = 6, **changes: Any) -> Any:
    """SmolVLM: 2 × 2 patches shuffled into a token, a Llama decoder at ``model.text_model``."""
    return _idefics("SmolVLM", attention, seed, layers, changes)


def idefics3(attention: str = "sdpa", seed: int = 0, layers: int = 6, **changes: Any) -> Any:
    """Idefics3: as SmolVLM."""
    return _idefics("Idefics3", attention, seed, layers, changes)


def _idefics(kind: str, attention: str, seed: int, layers: int, text: dict[str, Any]) -> Any:
    vision = getattr(transformers, f"{kind}VisionConfig")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=4,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=decoder_config("llama", layers, **text),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return assemble(kind, config, attention, seed)


class IdeficsPrompts(TilePrompts):
    """``pixel_values`` [B, most tiles of a prompt, 3, 24, 24], zero where a prompt has fewer, and
    ``pixel_attention_mask`` [B, tiles, 24, 24], zero there, too, and at the lower and right rim of
    an image smaller than a tile.

    Every tile has a marker and a word for its place before it, rows of tiles end in a line break,
    the thumbnail comes last."""

    sizes = ((24, 24), (24, 48), (20, 24))

    def layout(self, size: tuple[int, int], tile: list[int]) -> list[int]:
        rows, columns = tile_grid(size)
        ids: list[int] = []
        if rows * columns > 1:
            for row in range(rows):
                for column in range(columns):
                    ids += [AROUND_TOKEN, 20 + 6 * row + column, *tile]
                ids.append(BREAK)
            ids.append(BREAK)
        return [*ids, AROUND_TOKEN, GLOBAL_TOKEN, *tile, AROUND_TOKEN]

    def image(self, model: Any, size: tuple[int, int], generator: torch.Generator) -> Piece:
        piece = super().image(model, size, generator)
        pixels = piece.inputs["pixel_values"]
        mask = torch.ones_like(pixels[:, 0], dtype=torch.long)
        if len(pixels) == 1:
            mask[:, size[0] :] = 0
            mask[:, :, size[1] :] = 0
        piece.inputs["pixel_values"] = pixels * mask[:, None]
        piece.inputs["pixel_attention_mask"] = mask
        return piece

    def collate(self, images: Sequence[Piece], videos: Sequence[Piece]) -> dict[str, Tensor]:
        # rows of text after the last image are not known here: :meth:`inputs` adds them
        rows = range(max(image.row for image in images) + 1)
        out: dict[str, Tensor] = {}
        for name in ("pixel_values", "pixel_attention_mask"):
            empty = images[0].inputs[name][:0]
            tiles = [[i.inputs[name] for i in images if i.row == row] for row in rows]
            out[name] = pad_sequence([torch.cat([empty, *row]) for row in tiles], batch_first=True)
        return out

    def inputs(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        out = super().inputs(*args, **kwargs)
        for name in ("pixel_values", "pixel_attention_mask"):
            if name in out:
                more = len(out["input_ids"]) - len(out[name])
                out[name] = torch.cat([out[name], out[name].new_zeros(more, *out[name].shape[1:])])
        return out

    def cut(
        self, inputs: dict[str, Tensor], row: int, images: slice, videos: slice
    ) -> dict[str, Tensor]:
        real = inputs["pixel_attention_mask"][row].flatten(1).any(-1)
        names = ("pixel_values", "pixel_attention_mask")
        return {name: inputs[name][row : row + 1, real] for name in names}


# -------------------------------------------------------------- Aya Vision, Cohere2 Vision


def aya_vision(
    attention: str = "sdpa", seed: int = 0, layers: int = 6, window: int = 6, **changes: Any
) -> Any:
    """Aya Vision: a Cohere2 decoder, whose every third layer is full and has no rotation; the
    others see ``window`` tokens back."""
    config = transformers.AyaVisionConfig(
        vision_config=vision_config("siglip", 3),
        text_config=decoder_config("cohere2", layers, **_cohere2(layers, window), **changes),
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )
    return assemble("AyaVision", config, attention, seed)


def cohere2_vision(
    attention: str = "sdpa", seed: int = 0, layers: int = 6, window: int = 6, **changes: Any
) -> Any:
    """Cohere2 Vision (Command A Vision): the decoder as Aya Vision's."""
    config = transformers.Cohere2VisionConfig(
        vision_config=vision_config("siglip", 3),
        text_config=decoder_config("cohere2", layers, **_cohere2(layers, window), **changes),
        image_token_id=IMAGE_TOKEN,
        alignment_intermediate_size=64,
        tie_word_embeddings=False,
    )
    return assemble("Cohere2Vision", config, attention, seed)


def _cohere2(layers: int, window: int) -> dict[str, Any]:
    kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)]
    return {"layer_types": kinds, "sliding_window": window, "logit_scale": 1.0}


class AyaPrompts(TilePrompts):
    """A word before every tile, the thumbnail last, begin and end around all."""

    def layout(self, size: tuple[int, int], tile: list[int]) -> list[int]:
        ids: list[int] = []
        for number in range(tile_count(size) - 1):
            ids += [20 + number, *tile]
        return [BEGIN_TOKEN, *ids, GLOBAL_TOKEN, *tile, END_TOKEN]


class Cohere2Prompts(TilePrompts):
    """A marker after every tile, begin and end around all."""

    def layout(self, size: tuple[int, int], tile: list[int]) -> list[int]:
        return [BEGIN_TOKEN, *[*tile, AROUND_TOKEN] * tile_count(size), END_TOKEN]


FAMILIES: dict[str, tuple[Callable[..., Any], PromptMaker]] = {
    "internvl": (internvl, InternVLPrompts()),
    "smolvlm": (smolvlm, IdeficsPrompts()),
    "idefics3": (idefics3, IdeficsPrompts()),
    "aya-vision": (aya_vision, AyaPrompts()),
    "cohere2-vision": (cohere2_vision, Cohere2Prompts()),
}
