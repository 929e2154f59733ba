"""Where the patches of a tiled image lie on the map stitched from all crops."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["raster_position", "stitched_bounds", "tile_windows", "unpad_bounds"]


def raster_position(patch: Tensor, tiles: tuple[int, int], side: int) -> Tensor:
    """Position of patches on the map stitched from all crops, in raster order.

    Args:
        patch: [h·w, K] long, patch numbers 0…side²−1 inside each crop; crops row by row.
        tiles: (h, w) crops down and across.
        side: patches along the edge of a crop.

    Returns:
        LongTensor [h·w, K] in 0…h·w·side²−1.

    Raises:
        ValueError: ``patch`` does not have h·w rows, or ``side`` < 1.
    """
    down, across = tiles
    if patch.dim() != 2 or patch.shape[0] != down * across:
        raise ValueError(
            f"patch has shape {tuple(patch.shape)}; with tiles={tiles} it should be "
            f"[{down * across}, K]"
        )
    if side < 1:
        raise ValueError(f"side is {side}; it should be at least 1")
    tile = torch.arange(down * across, device=patch.device)[:, None]
    y = tile // across * side + patch // side
    x = tile % across * side + patch % side
    return y * (across * side) + x


def unpad_bounds(
    grid_height: int,
    grid_width: int,
    original_size: tuple[int, int],
    digits: int | None = None,
) -> tuple[int, int, int, int]:
    """Rows and columns of a stitched map that show the image and not its padding.

    With the aspect ratio of the image above the map's: new = int(H · (width / W)) rows show it,
    (height − new) // 2 are cut off at the top and as many at the bottom; otherwise the same with
    columns.

    Args:
        grid_height: rows of the map.
        grid_width: columns of the map.
        original_size: (W, H) of the image in pixels.
        digits: decimals that the number of visible rows (columns) is rounded to before it is
            floored; transformers uses 7, the original code (None) does not round.

    Returns:
        (top, bottom, left, right), half open: rows top ≤ y < bottom, columns left ≤ x < right.

    Raises:
        ValueError: a size is not positive.

    Source: the unpadding rule of the original LLaVA-NeXT code, as FlowCut uses it.
    """
    width, height = original_size
    if min(grid_height, grid_width, width, height) < 1:
        raise ValueError(
            f"grid is {grid_height}×{grid_width} and original_size is {original_size}; all should "
            "be positive"
        )

    def visible(length: float) -> int:
        return int(length if digits is None else round(length, digits))

    if width / height > grid_width / grid_height:
        pad = (grid_height - visible(height * (grid_width / width))) // 2
        return pad, grid_height - pad, 0, grid_width
    pad = (grid_width - visible(width * (grid_height / height))) // 2
    return 0, grid_height, pad, grid_width - pad


def stitched_bounds(
    grid: tuple[int, int], tile_grid: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Rows and columns of the map stitched from all crops that transformers packs.

    Args:
        grid: (height, width) of one crop's map, in patches or in pooled patches.
        tile_grid: crops (down, across).
        size: (height, width) of the image in pixels.

    Returns:
        (top, bottom, left, right), half open.

    Raises:
        ValueError: a size is not positive.

    Source: the unpadding rule of transformers' LLaVA-NeXT.
    """
    down, across = tile_grid
    return unpad_bounds(grid[0] * down, grid[1] * across, (size[1], size[0]), digits=7)


def tile_windows(
    grid: tuple[int, int], tile_grid: tuple[int, int], size: tuple[int, int] | None
) -> list[tuple[int, int, int, int]]:
    """The part of each tile's map that shows the image and not its padding.

    Args:
        grid: (height, width) of a tile's map.
        tile_grid: crops (down, across); (0, 0) without crops.
        size: (height, width) of the image in pixels; None: nothing is padded.

    Returns:
        (top, bottom, left, right) per tile, half open, the base tile (whole) first; empty windows
        have bottom = top or right = left.

    Raises:
        ValueError: a size is not positive.
    """
    height, width = grid
    down, across = tile_grid
    bounds = (0, height * down, 0, width * across)
    if size is not None and down * across:
        bounds = stitched_bounds(grid, tile_grid, size)

    def inside(low: int, high: int, start: int, length: int) -> tuple[int, int]:
        first = min(max(low - start, 0), length)
        return first, max(first, min(high - start, length))

    windows = [(0, height, 0, width)]
    for y in range(down):
        top, bottom = inside(bounds[0], bounds[1], y * height, height)
        for x in range(across):
            left, right = inside(bounds[2], bounds[3], x * width, width)
            windows.append((top, bottom, left, right))
    return windows
