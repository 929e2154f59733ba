"""Orders in which the surviving tokens of a tiled image enter the prompt, as indices."""

from __future__ import annotations

import torch
from torch import Tensor


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


def flowcut_pack(
    kept: Tensor,
    tiles: tuple[int, int],
    side: int = 24,
    base: int | None = None,
    original_size: tuple[int, int] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Base tile first, then the kept patches of all crops in raster order of the stitched map.

    No newline tokens; the official code appends one to an image of one tile, which is the
    caller's business.

    Args:
        kept: [h·w, K] long, ascending patch numbers kept in each crop.
        tiles: (h, w) crops down and across.
        side: patches along the edge of a crop.
        base: rows of the base tile; None means K.
        original_size: (W, H) of the image in pixels: drop patches on padding; None keeps them.
        valid: [h·w, K] bool, entries of ``kept`` that count; None means all.

    Returns:
        LongTensor [n, 2]: tile (0 = base, crops from 1) and row inside it, in prompt order.

    Raises:
        ValueError: shapes do not match, ``base`` negative.

    Synchronises with the host when ``original_size`` or ``valid`` is given (their number).

    Source: FlowCut, arXiv 2505.19536, official code for LLaVA-NeXT.
    """
    position = raster_position(kept, tiles, side)
    order = position.flatten().argsort(stable=True)
    lasting = None if valid is None else valid.flatten()[order]
    if original_size is not None:
        width = tiles[1] * side
        top, bottom, left, right = unpad_bounds(tiles[0] * side, width, original_size)
        at = position.flatten()[order]
        y, x = at // width, at % width
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        lasting = inside if lasting is None else lasting & inside
    if lasting is not None:
        order = order[lasting]
    return torch.cat([_base_rows(kept, base), _crop_rows(order, kept.shape[1])])


def visionzip_pack(
    dominant: Tensor,
    contextual: int,
    tiles: tuple[int, int],
    side: int = 24,
    base: int | None = None,
) -> Tensor:
    """Base tile, kept patches of all crops in raster order, their class tokens, their merged ones.

    A tile holds its dominant tokens by ascending position, class token first, then its contextual
    ones. No newline tokens, nothing is unpadded.

    Args:
        dominant: [h·w, D] long, token numbers kept in each crop: 0 is the class token, patch p is
            p + 1; in any order.
        contextual: contextual tokens of each crop, at least 0.
        tiles: (h, w) crops down and across.
        side: patches along the edge of a crop.
        base: rows of the base tile; None means D + ``contextual``.

    Returns:
        LongTensor [n, 2]: tile (0 = base, crops from 1) and row inside it, in prompt order.

    Raises:
        ValueError: shapes do not match, ``contextual`` or ``base`` negative.

    Source: VisionZip, arXiv 2412.04467, official code for LLaVA-NeXT.
    """
    if contextual < 0:
        raise ValueError(f"contextual is {contextual}; it should be at least 0")
    if dominant.dim() != 2 or dominant.shape[1] < 1:
        raise ValueError(
            f"dominant has shape {tuple(dominant.shape)}; it should be [h·w, D] with D ≥ 1"
        )
    number, count = dominant.shape
    rows = count + contextual
    patch = dominant.sort(-1).values[:, 1:] - 1
    order = raster_position(patch, tiles, side).flatten().argsort(stable=True)
    own = max(1, count - 1)  # patches of each crop
    patches = order // own * rows + order % own + 1
    tile = torch.arange(number, device=dominant.device)[:, None] * rows
    last = tile + torch.arange(count, rows, device=dominant.device)
    order = torch.cat([patches, tile.flatten(), last.flatten()])
    return torch.cat(
        [_base_rows(dominant, rows if base is None else base), _crop_rows(order, rows)]
    )


def _base_rows(kept: Tensor, base: int | None) -> Tensor:
    count = kept.shape[1] if base is None else base
    if count < 0:
        raise ValueError(f"base is {base}; it should be at least 0")
    row = torch.arange(count, device=kept.device)
    return torch.stack([torch.zeros_like(row), row], dim=1)


def _crop_rows(order: Tensor, rows: int) -> Tensor:
    rows = max(1, rows)
    return torch.stack([order // rows + 1, order % rows], dim=1)
