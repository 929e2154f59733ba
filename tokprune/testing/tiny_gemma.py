"""Tiny random Gemma 3, Gemma 4 and PaliGemma models, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from tokprune.testing.pieces import Piece, PromptMaker
from tokprune.testing.tiny import IMAGE_TOKEN, PATCHES, VIDEO_TOKEN, VOCAB, vision_config
from tokprune.testing.tiny_prompts import BEGIN_TOKEN, BREAK, END_TOKEN, StackedPrompts
from tokprune.testing.tiny_weights import assemble, decoder_config, has_decoder

#: patches along each side of an image of Gemma 3, and pixels along a side of a patch
SIDE = 8
PATCH = 4
#: Gemma 4: patches along a side of a cell, and cells to which the processor pads images
POOL = 2
MOST_CELLS = 36


# ------------------------------------------------------------------------------- Gemma 3


def gemma3(
    attention: str = "sdpa", seed: int = 0, layers: int = 6, window: int = 6, **changes: Any
) -> Any:
    """Gemma 3: 8 × 8 patches pooled to 4 × 4 tokens; every third layer is full, the others see
    ``window`` tokens back; ``changes``: of the decoder's config (so for all builders here)."""
    kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)]
    text = {
        "sliding_window": window,
        "layer_types": kinds,
        "query_pre_attn_scalar": 8,
        **changes,
    }
    config = transformers.Gemma3Config(
        text_config=decoder_config("gemma3", layers, **text),
        vision_config=vision_config("siglip", 3, image_size=SIDE * PATCH, patch_size=PATCH),
        mm_tokens_per_image=(SIDE // 2) ** 2,
        boi_token_index=BEGIN_TOKEN,
        eoi_token_index=END_TOKEN,
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )
    return assemble("Gemma3", config, attention, seed)


class Gemma3Prompts(StackedPrompts):
    """Images of one size, all [3, 32, 32]: line break, begin, 16 placeholders, end, line break.
    ``token_type_ids`` are 1 at placeholders alone."""

    types = "token_type_ids"

    def layout(self, model: Any) -> list[int]:
        placeholders = [IMAGE_TOKEN] * model.config.mm_tokens_per_image
        return [BREAK, BEGIN_TOKEN, *placeholders, END_TOKEN, BREAK]


# ------------------------------------------------------------------------------- Gemma 4


def gemma4(
    attention: str = "sdpa", seed: int = 0, layers: int = 6, window: int = 6,
    per_layer: bool = False, shared: int = 0, **changes: Any,
) -> Any:  # fmt: skip
    """Gemma 4: patches of any grid pooled 2 × 2; every third layer and the last are full, with
    heads of 16 instead of 8 and keys that are values, the others see ``window`` tokens back.

    ``per_layer``: inputs per layer, and images seen causally, as small checkpoints have it;
    ``shared``: this many last layers read the keys of earlier ones (implies ``per_layer``: models
    with the one and without the other fail in transformers)."""
    per_layer = per_layer or shared > 0
    kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)]
    kinds[-1] = "full_attention"
    text = {
        "sliding_window": window,
        "layer_types": kinds,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": not per_layer,
        "use_bidirectional_attention": None if per_layer else "vision",
        "hidden_size_per_layer_input": 8 if per_layer else 0,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": shared,
        "final_logit_softcapping": 30.0,
        **changes,
    }
    vision = transformers.Gemma4VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, patch_size=PATCH, pooling_kernel_size=POOL,
        position_embedding_size=64,
    )  # fmt: skip
    config = transformers.Gemma4Config(
        text_config=decoder_config("gemma4", layers, **text),
        vision_config=vision,
        boi_token_id=BEGIN_TOKEN,
        eoi_token_id=END_TOKEN,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        audio_token_id=97,
        boa_token_id=92,
        eoa_token_index=93,
        tie_word_embeddings=False,
    )
    return assemble("Gemma4", config, attention, seed)


class Gemma4Prompts(PromptMaker):
    """Images of h × w cells of 8 × 8 pixels: begin, h · w placeholders, end.

    ``pixel_values`` [images, patches, 48] and ``image_position_ids`` [images, patches, 2] (x, y;
    -1 where padded), padded to one length; frames of videos alike under their own names, with
    ``num_frames_per_video`` [videos]. ``mm_token_type_ids``: 1 image, 2 video."""

    types = "mm_token_type_ids"
    sizes = ((24, 24), (24, 48), (32, 16))

    def image(self, model: Any, size: tuple[int, int], generator: torch.Generator) -> Piece:
        rows, columns = (max(1, pixels // (PATCH * POOL)) for pixels in size)
        pixels, positions = _patches(1, rows, columns, generator)
        ids = [BEGIN_TOKEN, *[IMAGE_TOKEN] * (rows * columns), END_TOKEN]
        types = [int(i == IMAGE_TOKEN) for i in ids]
        return Piece(ids, types, {"pixel_values": pixels, "image_position_ids": positions})

    def video(self, model: Any, frames: int, generator: torch.Generator) -> Piece:
        pixels, positions = _patches(frames, 2, 3, generator)
        ids: list[int] = []
        for frame in range(frames):  # the time of each frame stands before it
            ids += [14, 15 + frame, BEGIN_TOKEN, *[VIDEO_TOKEN] * 6, END_TOKEN]
        types = [2 * int(i == VIDEO_TOKEN) for i in ids]
        return Piece(ids, types, {"pixel_values_videos": pixels, "video_position_ids": positions})

    def collate(self, images: Sequence[Piece], videos: Sequence[Piece]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if images:
            for name, fill in (("pixel_values", 0), ("image_position_ids", -1)):
                out[name] = _stack([i.inputs[name] for i in images], fill)
        if videos:
            for name, fill in (("pixel_values_videos", 0), ("video_position_ids", -1)):
                out[name] = _stack([v.inputs[name] for v in videos], fill)
            counts = [len(v.inputs["pixel_values_videos"]) for v in videos]
            out["num_frames_per_video"] = torch.tensor(counts)
        return out

    def cut(
        self, inputs: dict[str, Tensor], row: int, images: slice, videos: slice
    ) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if images.start < images.stop:
            for name in ("pixel_values", "image_position_ids"):
                out[name] = inputs[name][images]
        if videos.start < videos.stop:
            counts = inputs["num_frames_per_video"]
            first = int(counts[: videos.start].sum())
            last = first + int(counts[videos].sum())
            for name in ("pixel_values_videos", "video_position_ids"):
                out[name] = inputs[name][first:last]
            out["num_frames_per_video"] = counts[videos]
        return out


def _patches(
    count: int, rows: int, columns: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random pixels [count, patches, 48] of grids of cells, and the patches' places (x, y)."""
    y, x = torch.meshgrid(torch.arange(rows * POOL), torch.arange(columns * POOL), indexing="ij")
    places = torch.stack([x, y], -1).flatten(0, 1).expand(count, -1, -1)
    return torch.rand(count, places.shape[1], 3 * PATCH**2, generator=generator), places


def _stack(tensors: Sequence[Tensor], fill: int) -> Tensor:
    """[n, patches, d] each, as one tensor of as many patches as the processor always pads to."""
    longest = max(MOST_CELLS * POOL**2, *(t.shape[1] for t in tensors))
    out = [functional.pad(t, (0, 0, 0, longest - t.shape[1]), value=fill) for t in tensors]
    return torch.cat(out)


# ------------------------------------------------------------------------------- PaliGemma


def paligemma(attention: str = "sdpa", seed: int = 0, layers: int = 6, **changes: Any) -> Any:
    """PaliGemma 1: images of 6 × 6 tokens, a Gemma decoder that sees all of the prompt."""
    return _paligemma("gemma", attention, seed, layers, {"num_key_value_heads": 1, **changes})


def paligemma2(attention: str = "eager", seed: int = 0, layers: int = 6, **changes: Any) -> Any:
    """PaliGemma 2: a Gemma 2 decoder with soft-capped scores, "eager" only."""
    text = {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, **changes}
    return _paligemma("gemma2", attention, seed, layers, text)


def _paligemma(decoder: str, attention: str, seed: int, layers: int, text: dict[str, Any]) -> Any:
    config = transformers.PaliGemmaConfig(
        text_config=decoder_config(decoder, layers, **text),
        vision_config=vision_config("siglip", 3),
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    return assemble("PaliGemma", config, attention, seed)


class PaliGemmaPrompts(StackedPrompts):
    """Images [3, 24, 24] of 36 placeholders without markers; a prompt starts after its last image
    with the begin token and ends with a line break; ``token_type_ids`` are 0: all is prefix."""

    types = "token_type_ids"

    def layout(self, model: Any) -> list[int]:
        return [IMAGE_TOKEN] * PATCHES

    def inputs(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        out = super().inputs(*args, **kwargs)
        out["token_type_ids"].zero_()
        for ids, mask in zip(out["input_ids"], out["attention_mask"]):
            real = mask.nonzero()[:, 0]
            places = (ids == IMAGE_TOKEN).nonzero()[:, 0]
            start, end = int(places[-1]) + 1 if len(places) else int(real[0]), int(real[-1])
            if start < end:  # else there is no room for both
                ids[start], ids[end] = 1, BREAK
        return out


FAMILIES: dict[str, tuple[Callable[..., Any], PromptMaker]] = {
    "gemma3": (gemma3, Gemma3Prompts()),
    **({"gemma4": (gemma4, Gemma4Prompts())} if has_decoder("gemma4") else {}),
    "paligemma": (paligemma, PaliGemmaPrompts()),
    "paligemma2": (paligemma2, PaliGemmaPrompts()),
}
