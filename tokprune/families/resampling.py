"""How models make fewer cells of the patches of a frame or of stitched crops, on numbers alone."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from tokprune.engine.model import ImageLayout, TokenGrid

#: (top, bottom, left, right), half open
Bounds = tuple[int, int, int, int]


def frames_of(pixels: Tensor) -> tuple[int, int]:
    """Videos, and frames of each, of pixels [videos, frames, channels, height, width].

    Raises:
        ValueError: they have another form.
    """
    if pixels.dim() != 5:
        raise ValueError(
            f"pixel_values_videos has {pixels.dim()} dimensions; it should be [videos, frames, "
            "channels, height, width]"
        )
    return pixels.shape[0], pixels.shape[1]


def pooled_video(
    frames: int, grid: tuple[int, int], small: tuple[int, int], stride: int | None, newline: bool
) -> ImageLayout:
    """A video whose frames the model pools.

    Args:
        frames: its frames.
        grid: (height, width) of the tower's grid.
        small: the same of the pooled grid.
        stride: pooled by windows of this width before the projector; None: by interpolation,
            after it.
        newline: one newline token ends the video.
    """
    cells = frames * small[0] * small[1]
    packed = torch.arange(cells)
    if newline:
        packed = torch.cat([packed, torch.tensor([-1])])
    mean = partial(_pooled, grid=grid, small=small, stride=stride)
    projected = None if stride is None else small[0] * small[1]
    return ImageLayout(
        packed, frames, frames=frames, video=True, token_grid=TokenGrid((small,) * frames, mean),
        projected=projected,
    )  # fmt: skip


def _pooled(
    values: Tensor, grid: tuple[int, int], small: tuple[int, int], stride: int | None
) -> Tensor:
    """[frames, N, …] → [frames · cells, …]."""
    maps = values.flatten(2) if values.dim() > 2 else values[..., None]
    maps = maps.movedim(2, 1).unflatten(2, grid)  # one channel for each number of a patch
    if stride is not None:
        less = avg_pool2d(maps, stride)
    else:
        less = interpolate(maps, size=small, mode="bilinear")
    return less.flatten(2).movedim(1, 2).reshape(-1, *values.shape[2:])


def shrunk_map(
    grid: tuple[int, int], tile_grid: tuple[int, int], bounds: Bounds, small: tuple[int, int]
) -> TokenGrid:
    """A tiled image whose stitched crops the model interpolates to fewer cells.

    Args:
        grid: (height, width) of a tile's grid.
        tile_grid: crops (down, across).
        bounds: part of the stitched map that shows the image.
        small: (height, width) of the interpolated map.
    """
    top, bottom, left, right = bounds
    (height, width), (down, across) = grid, tile_grid
    y, x = torch.arange(down * height), torch.arange(across * width)
    own_y = ((y - top) * small[0]).div(max(1, bottom - top), rounding_mode="floor")
    own_x = ((x - left) * small[1]).div(max(1, right - left), rounding_mode="floor")
    shown = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    stitched = torch.where(shown, own_y[:, None] * small[1] + own_x + height * width, -1)
    crops = stitched.view(down, height, across, width).transpose(1, 2).reshape(-1)
    nearest = torch.cat([torch.arange(height * width), crops])
    mean = partial(_shrunk, grid=grid, tile_grid=tile_grid, bounds=bounds, small=small)
    return TokenGrid((grid, small), mean, nearest)


def _shrunk(
    values: Tensor,
    grid: tuple[int, int],
    tile_grid: tuple[int, int],
    bounds: Bounds,
    small: tuple[int, int],
) -> Tensor:
    """[tiles, N, …] → [base cells + map cells, …]."""
    (height, width), (down, across) = grid, tile_grid
    top, bottom, left, right = bounds
    stitched = values[1:].reshape(down, across, height, width, -1).transpose(1, 2)
    stitched = stitched.reshape(down * height, across * width, -1)[top:bottom, left:right]
    less = interpolate(stitched.movedim(2, 0)[None], size=small, mode="bilinear")[0]
    return torch.cat([values[0], less.flatten(1).movedim(0, 1).reshape(-1, *values.shape[2:])])
