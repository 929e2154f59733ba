"""Images and videos as the processors of newer families would give them, made without them."""

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


def moving(
    model: Any, family: str, image: Image.Image, frames: int
) -> tuple[dict[str, Tensor], list[int]]:
    """As :func:`picture`, for a video: the image, drifting from frame to frame.

    Raises:
        ValueError: a family of which no videos are made here.
    """
    if family not in _VIDEOS:
        known = ", ".join(_VIDEOS)
        raise ValueError(f"frames={frames}: no videos are made for {family}; for {known} they are")
    return _VIDEOS[family](model.config, image, frames)


def marks(model: Any, family: str, ids: Tensor) -> dict[str, Tensor]:
    """What processors say of every token [n], where the model takes it: 1 at images, 2 at
    videos."""
    known = inspect.signature(model.forward).parameters
    name = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
    if name not in known or family not in _TYPED:
        return {}
    config = model.config
    types = (ids == config.image_token_id).long()
    if family != "gemma3":
        types += 2 * (ids == config.video_token_id)
    return {name: types}


def _values(image: Image.Image, height: int, width: int) -> Tensor:
    """[3, height, width] of the resized image."""
    resized = image.resize((width, height))
    values = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    return values.view(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1


def _patches(config: Any, image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
    """Packed patches of an image of any size, those of a cell next to each other (Qwen)."""
    down, across = _cells(config, image)
    grid, packed = _packed(config, image, 1)
    ids = [config.image_token_id] * (down * across)
    return (
        {"pixel_values": packed, "image_grid_thw": grid},
        [config.vision_start_token_id, *ids, config.vision_end_token_id],
    )


def _cells(config: Any, image: Image.Image) -> tuple[int, int]:
    """Rows and columns of visual tokens."""
    cell = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    return max(1, round(image.height / cell)), max(1, round(image.width / cell))


def _packed(config: Any, image: Image.Image, frames: int) -> tuple[Tensor, Tensor]:
    """Grid [1, 3] in patches and patches [n, values]; with ``frames`` above 1 the image drifts by
    a patch to the side in each."""
    vision = config.vision_config
    patch, merge, group = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    down, across = _cells(config, image)
    still = _values(image, down * patch * merge, across * patch * merge)
    times = -(-frames // group)
    parts = []
    for time in range(times):
        # a still image fills its group of frames with itself
        shown = [still.roll(patch * (group * time + n) * (frames > 1), -1) for n in range(group)]
        cut = torch.stack(shown).view(group, 3, down, merge, patch, across, merge, patch)
        cut = cut.permute(2, 5, 3, 6, 1, 0, 4, 7)
        parts.append(cut.reshape(down * across * merge**2, -1))
    return torch.tensor([[times, down * merge, across * merge]]), torch.cat(parts)


def _whole_video(config: Any, image: Image.Image, frames: int) -> tuple[Any, list[int]]:
    """One run of tokens; a second between the times of its grid (Qwen2.5-VL)."""
    grid, packed = _packed(config, image, frames)
    down, across = _cells(config, image)
    ids = [config.video_token_id] * (int(grid[0, 0]) * down * across)
    return (
        {
            "pixel_values_videos": packed, "video_grid_thw": grid,
            "second_per_grid_ts": torch.ones(1),
        },
        [config.vision_start_token_id, *ids, config.vision_end_token_id],
    )  # fmt: skip


def _islands(config: Any, image: Image.Image, frames: int) -> tuple[Any, list[int]]:
    """A run of tokens for every time of the grid, each after words that tell it (Qwen3-VL)."""
    grid, packed = _packed(config, image, frames)
    down, across = _cells(config, image)
    start, end = config.vision_start_token_id, config.vision_end_token_id
    # as many tokens as "<12.5 seconds>" has; which ones does not matter for time
    low = min(start, end, config.image_token_id, config.video_token_id)
    words = range(low - 7, low)
    ids: list[int] = []
    for _ in range(int(grid[0, 0])):
        ids += [*words, start, *[config.video_token_id] * (down * across), end]
    return {"pixel_values_videos": packed, "video_grid_thw": grid}, ids


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
_VIDEOS = {
    "qwen2.5-vl": _whole_video,
    "qwen3-vl": _islands,
}
#: families whose processors type the tokens
_TYPED = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "gemma3")
