"""Prompts for tiny models: random text, images and clips, batches padded on either side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokprune.families import bind


def count_image_tokens(model: Any, size: tuple[int, int] | None = None, alone: bool = True) -> int:
    """Prompt tokens the model makes of one image of ``size`` (height, width); ``alone``: it is
    the only one of its prompt."""
    bound = bind(model)
    call = {
        "pixel_values": torch.zeros(1, 3, 1, 1), "image_sizes": [size] if size else None,
        "batch_num_images": [1] if alone else [2],
    }  # fmt: skip
    layouts = bound.family.images(bound.parts, bound.facts, call)
    assert isinstance(layouts, list)
    return len(layouts[0].packed)


def count_video_tokens(model: Any, frames: int) -> int:
    """Prompt tokens the model makes of a video of so many frames."""
    bound = bind(model)
    call = {"pixel_values_videos": torch.zeros(1, frames, 3, 1, 1)}
    return len(bound.family.videos(bound.parts, bound.facts, call)[0].packed)


def make_inputs(
    model: Any, prompts: list[list[Any]], sizes: list[tuple[int, int]] | None = None,
    seed: int = 1, pad_side: str = "left", frames: int = 4,
) -> dict[str, Tensor]:  # fmt: skip
    """Inputs of a batch of random prompts, placeholders and pixels that fit each other.

    Args:
        model: a tiny model.
        prompts: each lists text lengths, ``"image"`` and ``"video"`` entries, for example
            ``[4, "image", 6]``.
        sizes: (height, width) in pixels of every image, for models that cut images into tiles.
        seed: of text and pixels.
        pad_side: "left" or "right".
        frames: of every video, each the frame before with some of its patches drawn anew.

    Returns:
        ``input_ids`` and ``attention_mask`` [B, L] long; ``pixel_values`` float32 [images, 3, H, W]
        or [images, tiles, 3, H, W] with ``image_sizes`` [images, 2] (and ``batch_num_images`` [B],
        where a prompt's only image alone is tiled); ``pixel_values_videos`` [videos, frames, 3, H,
        W].
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    side = config.vision_config.image_size
    grid = side // config.vision_config.patch_size
    parts = bind(model).parts
    tiled = hasattr(config, "image_grid_pinpoints")
    whole = hasattr(config, "vision_aspect_ratio")  # several images of a prompt are not tiled
    images = sum(part == "image" for prompt in prompts for part in prompt)
    videos = sum(part == "video" for prompt in prompts for part in prompt)
    sizes = (sizes or [(20, 40)] * images) if tiled else None
    rows, image, alone = [], 0, []
    for prompt in prompts:
        ids: list[Any] = []
        for part in prompt:
            if part == "image":
                size = sizes[image] if sizes else None
                alone.append(not whole or prompt.count("image") == 1)
                ids += [parts.image_token_id] * count_image_tokens(model, size, alone[-1])
                image += 1
            elif part == "video":
                ids += [parts.video_token_id] * count_video_tokens(model, frames)
            else:
                ids += torch.randint(3, 98, (part,), generator=generator).tolist()
        rows.append(ids)
    longest = max(map(len, rows))
    padded, mask = [], []
    for ids in rows:
        gap, ones = [0] * (longest - len(ids)), [1] * len(ids)
        padded.append(gap + ids if pad_side == "left" else ids + gap)
        mask.append(gap + ones if pad_side == "left" else ones + gap)
    inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
    if images and sizes is not None:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        tiles = [
            image_size_to_num_patches(list(s), config.image_grid_pinpoints, side) if one else 1
            for s, one in zip(sizes, alone)
        ]
        pixels = torch.zeros(images, max(tiles), 3, side, side)
        for i, n in enumerate(tiles):
            pixels[i, :n] = torch.randn(n, 3, side, side, generator=generator)
        inputs["pixel_values"] = pixels
        inputs["image_sizes"] = torch.tensor(sizes[:images])
        if whole:
            counts = [prompt.count("image") for prompt in prompts]
            inputs["batch_num_images"] = torch.tensor(counts)
    elif images:
        inputs["pixel_values"] = torch.randn(images, 3, side, side, generator=generator)
    if videos:
        clips = [_clip(frames, side, grid, generator) for _ in range(videos)]
        inputs["pixel_values_videos"] = torch.stack(clips)
    return inputs


def _clip(frames: int, side: int, grid: int, generator: torch.Generator) -> Tensor:
    """[frames, 3, H, W] in which parts of the image stand still for a while."""
    clip = [torch.randn(3, side, side, generator=generator)]
    patch = side // grid
    for _ in range(1, frames):
        again = torch.rand(grid, grid, generator=generator) < 0.4
        where = again.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        new = torch.randn(3, side, side, generator=generator)
        clip.append(torch.where(where, new, clip[-1]))
    return torch.stack(clip)


def take_row(
    inputs: dict[str, Tensor], row: int, images: slice, videos: slice = slice(0, 0)
) -> dict[str, Tensor]:
    """One row of a batch as a batch of one, padding removed.

    Args:
        inputs: as :func:`make_inputs` makes them.
        row: row of the batch.
        images, videos: which of the batch's images and videos are this row's.
    """
    real = inputs["attention_mask"][row] != 0
    out = {
        "input_ids": inputs["input_ids"][row : row + 1, real],
        "attention_mask": inputs["attention_mask"][row : row + 1, real],
    }
    for name in ("pixel_values", "image_sizes"):
        if name in inputs and images.start < images.stop:
            out[name] = inputs[name][images]
    if "batch_num_images" in inputs and images.start < images.stop:
        out["batch_num_images"] = inputs["batch_num_images"][row : row + 1]
    if videos.start < videos.stop:
        out["pixel_values_videos"] = inputs["pixel_values_videos"][videos]
    return out
