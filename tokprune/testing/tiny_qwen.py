"""Tiny random models of the Qwen families, with makers of prompts: Qwen2-VL, 2.5, 3, 3.5.

Patches of 4 × 4 pixels, 2 × 2 of them a cell, so 8 × 8 pixels a visual token. The rotary base is
small, so that every axis of a position changes the outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers

from tokprune.testing.grid_prompts import TYPED, GridMaker, IslandMaker, TimedMaker
from tokprune.testing.pieces import PromptMaker
from tokprune.testing.tiny import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    Builder,
    decoder_fields,
    randomise,
)

START_TOKEN = 97
END_TOKEN = 96
PATCH = 4
MERGE = 2
#: pixels along each side of a cell
CELL = PATCH * MERGE
HIDDEN = 64


def rope(section: Sequence[int], partial: float = 1.0) -> dict[str, Any]:
    """Fields of a text config for a rotation whose frequencies are shared out by ``section`` to
    (t, h, w), of the first ``partial`` of every head, as this release names them."""
    scaling: dict[str, Any] = {"rope_type": "default", "mrope_section": list(section)}
    if TYPED:
        scaling |= {"rope_theta": 20.0, "partial_rotary_factor": partial}
        return {"rope_parameters": scaling}
    return {"rope_theta": 20.0, "rope_scaling": scaling, "partial_rotary_factor": partial}


def text_fields(layers: int, **changes: Any) -> dict[str, Any]:
    """Fields that the text configs of all these families share; heads are 16 wide."""
    return {**decoder_fields(layers, HIDDEN, 96), **changes}


def _build(
    kind: str, attention: str, seed: int, vision: dict[str, Any], text: dict[str, Any]
) -> Any:
    """A model of transformers' ``{kind}Config`` and ``{kind}ForConditionalGeneration``."""
    tower = {
        "depth": 4,
        "hidden_size": 32,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        **vision,
    }
    config = getattr(transformers, f"{kind}Config")(
        vision_config=tower, text_config=text, image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN, vision_start_token_id=START_TOKEN,
        vision_end_token_id=END_TOKEN, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = attention
    return randomise(getattr(transformers, f"{kind}ForConditionalGeneration")(config), seed)


def qwen2_vl(attention: str = "sdpa", seed: int = 0, layers: int = 6, **changes: Any) -> Any:
    """Qwen2-VL. ``attention``: "eager", "sdpa"; ``changes``: of the text config (so for all)."""
    tower = {"embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2}
    text = text_fields(layers, **{**rope((2, 3, 3)), **changes})
    return _build("Qwen2VL", attention, seed, tower, text)


def qwen2_5_vl(attention: str = "sdpa", seed: int = 0, layers: int = 6, **changes: Any) -> Any:
    """Qwen2.5-VL: tower blocks 0 and 2 see windows of 2 × 2 cells, blocks 1 and 3 a whole frame."""
    tower = {
        "out_hidden_size": HIDDEN,
        "intermediate_size": 48,
        "window_size": 2 * CELL,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
    }
    text = text_fields(layers, **{**rope((2, 3, 3)), **changes})
    return _build("Qwen2_5_VL", attention, seed, tower, text)


def _qwen3_tower(**changes: Any) -> dict[str, Any]:
    """Fields of towers with 6 × 6 learned positions, interpolated to the grid of an image."""
    return {
        "out_hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_position_embeddings": 36,
        **changes,
    }


def qwen3_vl(attention: str = "sdpa", seed: int = 0, layers: int = 6, **changes: Any) -> Any:
    """Qwen3-VL: features of tower blocks 0, 1, 2 are added after decoder layers 0, 1, 2."""
    text = text_fields(layers, **{"head_dim": 16, **rope((3, 3, 2)), **changes})
    tower = _qwen3_tower(deepstack_visual_indexes=[0, 1, 2])
    return _build("Qwen3VL", attention, seed, tower, text)


def qwen3_vl_moe(attention: str = "sdpa", seed: int = 0, layers: int = 6, **changes: Any) -> Any:
    """Qwen3-VL-MoE: two of four experts a token in every layer; else as :func:`qwen3_vl`."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    text = text_fields(layers, **{"head_dim": 16, **experts, **rope((3, 3, 2)), **changes})
    tower = _qwen3_tower(deepstack_visual_indexes=[0, 1, 2])
    return _build("Qwen3VLMoe", attention, seed, tower, text)


def _hybrid(layers: int, **changes: Any) -> dict[str, Any]:
    """Fields of a decoder with full attention in every fourth layer, linear in the others."""
    fields = {
        "head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        **rope((2, 1, 1), partial=0.25),
    }
    return text_fields(layers, **{**fields, **changes})


def qwen3_5(attention: str = "sdpa", seed: int = 0, layers: int = 8, **changes: Any) -> Any:
    """Qwen3.5: layers 3 and 7 have full attention, with an output gate; the others are linear."""
    return _build("Qwen3_5", attention, seed, _qwen3_tower(), _hybrid(layers, **changes))


def qwen3_5_moe(attention: str = "sdpa", seed: int = 0, layers: int = 8, **changes: Any) -> Any:
    """Qwen3.5-MoE: two of four experts and a shared one; else as :func:`qwen3_5`."""
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    text = _hybrid(layers, **{**experts, **changes})
    return _build("Qwen3_5Moe", attention, seed, _qwen3_tower(), text)


_ALL: dict[str, tuple[str, Builder, PromptMaker]] = {
    "qwen2-vl": ("Qwen2VL", qwen2_vl, GridMaker()),
    "qwen2.5-vl": ("Qwen2_5_VL", qwen2_5_vl, TimedMaker()),
    "qwen3-vl": ("Qwen3VL", qwen3_vl, IslandMaker()),
    "qwen3-vl-moe": ("Qwen3VLMoe", qwen3_vl_moe, IslandMaker()),
    "qwen3.5": ("Qwen3_5", qwen3_5, IslandMaker()),
    "qwen3.5-moe": ("Qwen3_5Moe", qwen3_5_moe, IslandMaker()),
}
#: builder and prompt maker of every family that the installed release has
FAMILIES: dict[str, tuple[Builder, PromptMaker]] = {
    name: (build, maker)
    for name, (kind, build, maker) in _ALL.items()
    if hasattr(transformers, f"{kind}ForConditionalGeneration")
}
