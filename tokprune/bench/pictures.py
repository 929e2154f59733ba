"""An image as the processors of newer families would give it, made without them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


def picture(model: Any, family: str, image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
    """Pixel-side inputs of an image, and its tokens with the marks around them.

    Values are scaled to −1 … 1, which is near enough for random weights.

    Raises:
        ValueError: a family that needs its own processor.
    """
    if family not in _MAKERS:
        raise ValueError(f"a model of family {family} needs its own processor")
    return _MAKERS[family](model.config, image)


def marks(model: Any, family: str, ids: Tensor) -> dict[str, Tensor]:
    """What processors say of every token [n], where the model takes it: 1 at images."""
    known = inspect.signature(model.forward).parameters
    name = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
    if name not in known or family not in _TYPED:
        return {}
    return {name: (ids == model.config.image_token_id).long()}


def _values(image: Image.Image, height: int, width: int) -> Tensor:
    """[3, height, width] of the resized image."""
    resized = image.resize((width, height))
    values = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    return values.view(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1


def _patches(config: Any, image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
    """Packed patches of an image of any size, those of a cell next to each other (Qwen)."""
    vision = config.vision_config
    patch, merge, twice = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    cell = patch * merge
    down, across = (max(1, round(side / cell)) for side in (image.height, image.width))
    pixels = _values(image, down * cell, across * cell)
    cut = pixels.view(3, down, merge, patch, across, merge, patch)
    cut = cut.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
    packed = cut.expand(-1, -1, -1, -1, -1, twice, -1, -1).reshape(down * across * merge**2, -1)
    grid = torch.tensor([[1, down * merge, across * merge]])
    ids = [config.image_token_id] * (down * across)
    return (
        {"pixel_values": packed, "image_grid_thw": grid},
        [config.vision_start_token_id, *ids, config.vision_end_token_id],
    )


def _tiles(config: Any, image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
    """Square tiles, as many as fit, and a thumbnail where they are several (InternVL)."""
    side = int(config.vision_config.image_size[0])
    down, across = (max(1, round(length / side)) for length in (image.height, image.width))
    whole = _values(image, down * side, across * side).view(3, down, side, across, side)
    tiles = whole.permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
    if down * across > 1:
        tiles = torch.cat([tiles, _values(image, side, side)[None]])
    return {"pixel_values": tiles}, [config.image_token_id] * (len(tiles) * config.image_seq_length)


def _square(config: Any, image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
    """One square of as many tokens (Gemma 3)."""
    side = config.vision_config.image_size
    ids = [config.image_token_id] * config.mm_tokens_per_image
    return (
        {"pixel_values": _values(image, side, side)[None]},
        [config.boi_token_index, *ids, config.eoi_token_index],
    )


_MAKERS = {
    "qwen2-vl": _patches,
    "qwen2.5-vl": _patches,
    "qwen3-vl": _patches,
    "qwen3.5": _patches,
    "internvl": _tiles,
    "gemma3": _square,
}
#: families whose processors type the tokens
_TYPED = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "gemma3")
