"""Tiny random models of the GLM families with pictures, and prompts for them: GLM-4.1V, 4.5V (the
MoE) and 4.6V. Patches and cells as in :mod:`tokprune.testing.tiny_qwen`."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tokprune.testing.grid_prompts import GridMaker
from tokprune.testing.pieces import Piece, PromptMaker
from tokprune.testing.tiny import IMAGE_TOKEN, VIDEO_TOKEN, Builder, randomise
from tokprune.testing.tiny_qwen import (
    HIDDEN,
    MERGE,
    PATCH,
    rope,
    text_fields,
)

IMAGE_START, IMAGE_END = 97, 96
VIDEO_START, VIDEO_END = 95, 94


def _build(kind: str, attention: str, seed: int, text: dict[str, Any]) -> Any:
    """A model of transformers' ``{kind}Config`` and ``{kind}ForConditionalGeneration``."""
    tower = {
        "depth": 4,
        "hidden_size": 32,
        "num_heads": 2,
        "image_size": 6 * PATCH,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
        "intermediate_size": 48,
    }
    config = getattr(transformers, f"{kind}Config")(
        vision_config=tower, text_config=text, image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN, image_start_token_id=IMAGE_START, image_end_token_id=IMAGE_END,
        video_start_token_id=VIDEO_START, video_end_token_id=VIDEO_END, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = attention
    return randomise(getattr(transformers, f"{kind}ForConditionalGeneration")(config), seed)


def _text(layers: int, **changes: Any) -> dict[str, Any]:
    """Fields of a decoder that rotates half of every head, neighbours as pairs."""
    return text_fields(layers, **{**rope((2, 1, 1), partial=0.5), **changes})


def glm4v(attention: str = "sdpa", seed: int = 0, layers: int = 6, **changes: Any) -> Any:
    """GLM-4.1V. ``attention``: "eager", "sdpa"; ``changes``: of the text config (so for all)."""
    return _build("Glm4v", attention, seed, _text(layers, **changes))


def glm4v_moe(attention: str = "sdpa", seed: int = 0, layers: int = 6, **changes: Any) -> Any:
    """GLM-4.5V: layer 0 dense, then two of four experts and a shared one."""
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    }
    return _build("Glm4vMoe", attention, seed, _text(layers, **{**experts, **changes}))


def glm46v(attention: str = "sdpa", seed: int = 0, layers: int = 6, **changes: Any) -> Any:
    """GLM-4.6V (Flash): the modules of GLM-4.1V under another class and config."""
    text = {"model_type": "glm4v_text", **_text(layers, **changes)}
    return _build("Glm46V", attention, seed, text)


class GlmMaker(GridMaker):
    """Prompts of GLM: a video is a run of *image* placeholders per frame, each in image markers and
    followed by words that tell its time, all between video markers; the grid counts it once.

    A batch may hold images or videos, not both: the models count the placeholders of both kinds
    together and refuse.
    """

    def markers(self, model: Any) -> tuple[int, int]:
        return model.config.image_start_token_id, model.config.image_end_token_id

    def video(self, model: Any, frames: int, generator: torch.Generator) -> Piece:
        grid = self.grid(model, frames, self.frame)
        t = int(grid[0])
        ids, types = [model.config.video_start_token_id], [0]
        for _ in range(t):
            run = self.run(model, model.config.image_token_id, 2, self.cells(model, grid) // t)
            words = int(torch.randint(1, 4, (), generator=generator))
            ids += [*run[0], *torch.randint(3, 90, (words,), generator=generator).tolist()]
            types += [*run[1], *[0] * words]
        ids.append(model.config.video_end_token_id)
        types.append(0)
        return Piece(ids, types, self.pixels(model, grid, generator))


_ALL: dict[str, tuple[str, Builder, PromptMaker]] = {
    "glm4v": ("Glm4v", glm4v, GlmMaker()),
    "glm4v-moe": ("Glm4vMoe", glm4v_moe, GlmMaker()),
    "glm46v": ("Glm46V", glm46v, GlmMaker()),
}
#: builder and prompt maker of every family that the installed release has
FAMILIES: dict[str, tuple[Builder, PromptMaker]] = {
    name: (build, maker)
    for name, (kind, build, maker) in _ALL.items()
    if hasattr(transformers, f"{kind}ForConditionalGeneration")
}
