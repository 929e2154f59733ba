"""Tiny models with decoders as wide as visual tokens need to outweigh what is noted of them.

A token of a tiny model is 32 numbers, and its column, position and image are three more. Here it is
256 or 512: as in real models, memory is hidden states, keys and what an MLP makes of them.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from tokprune.testing import tiny_family
from tokprune.testing.tiny import randomise

#: fields of a decoder's config that grow; heads keep their width
_WIDTHS = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "num_attention_heads", "num_key_value_heads", "num_global_key_value_heads",
    "linear_num_key_heads", "linear_num_value_heads",
)  # fmt: skip
_FACTOR = 8
#: a size of images that families take whose grids follow the image
_FREE = (24, 40)
#: of all images of a prompt together, about
_TOKENS = 400


@functools.cache
def wide_model(family: str) -> Any:
    """The tiny model of a family under its plain backend, its decoder eight times as wide."""
    tiny = tiny_family(family)
    model = tiny.build(attention=tiny.backends[-1])
    config = model.config
    text, vision = config.text_config, config.vision_config
    text.allow_global_per_layer_attribute_access = True  # Gemma 4 counts some heads by layer
    before = text.hidden_size
    for name in _WIDTHS:
        if isinstance(value := getattr(text, name, None), int):
            setattr(text, name, _FACTOR * value)
    # what the encoder hands over is as wide as the decoder
    if hasattr(vision, "embed_dim") and vision.hidden_size == before:  # Qwen2-VL
        vision.hidden_size = text.hidden_size
    for own in (vision, config):
        for name in ("out_hidden_size", "projection_dim"):
            if getattr(own, name, None) == before:
                setattr(own, name, text.hidden_size)
    return randomise(type(model)(config))


@functools.cache
def visual_prompt(family: str, kind: str) -> dict[str, Tensor]:
    """Inputs of one prompt of many images, or of a video of many frames (``kind``: "image",
    "video"), without an attention mask: some hundred visual tokens and little text."""
    tiny, model = tiny_family(family), wide_model(family)
    free = _FREE in (tiny.sizes or ())
    if kind == "video":
        return _without_mask(tiny.inputs(model, [[4, "video", 10]], frames=48 if free else 16))
    size = (96, 96) if free else (48, 48)
    one = tiny.inputs(model, [["image"]], [size])["input_ids"]
    number = max(1, _TOKENS // one.shape[1])
    prompt = [4, *["image", 3] * number, 10]
    return _without_mask(tiny.inputs(model, [prompt], [size] * number))


def _without_mask(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "attention_mask"}
