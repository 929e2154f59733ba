"""The map stitched from all crops of an image, pooled: as the model packs full grids, unpadded at
the pooled resolution, with one newline token after each row."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from tokprune.engine.contracts import ImageTokens
from tokprune.operators.anyres import stitched_bounds


class PooledCrops:
    """Coordinates (y, x) are cells of the stitched map at full resolution, padding included;
    output rows are those of ``features``."""

    def __init__(self, image: ImageTokens, p: int) -> None:
        assert image.size is not None
        self.image, self.p = image, p
        self.small = image.grid[0] // p, image.grid[1] // p
        #: what shows the image: (top, bottom, left, right) in windows and in cells
        self.windows = stitched_bounds(self.small, image.tile_grid, image.size)
        self.cells = stitched_bounds(image.grid, image.tile_grid, image.size)

    def features(self, pooled: Tensor) -> Tensor:
        """Rows and newline tokens, [rows · (columns + 1), D], of ``pooled`` [crops, windows, D]."""
        assert self.image.newline_feature is not None
        top, bottom, left, right = self.windows
        stitched = rearrange(
            pooled, "(down across) (h w) d -> (down h) (across w) d",
            down=self.image.tile_grid[0], h=self.small[0],
        )[top:bottom, left:right]  # fmt: skip
        newline = self.image.newline_feature.to(pooled).expand(bottom - top, 1, -1)
        return torch.cat([stitched, newline], dim=1).flatten(0, 1)

    def stand_ins(self, index: Tensor, newlines: Tensor) -> Tensor:
        """The image token that stands for each output row: of a window its centre, or, where
        unpadding at full resolution cut that off, the nearest cell left.

        Args:
            index: token on each cell of all tiles, see :func:`index_of_cells`.
            newlines: newline tokens, in order.
        """
        image, p, device = self.image, self.p, index.device
        (height, width), across = image.grid, image.tile_grid[1]
        top, bottom, left, right = self.windows
        first, last, west, east = self.cells
        y = torch.arange(top, bottom, device=device) * p + p // 2
        x = torch.arange(left, right, device=device) * p + p // 2
        y, x = y.clamp(first, max(first, last - 1)), x.clamp(west, max(west, east - 1))
        if image.grids is None:
            tile = (y // height * across)[:, None] + x // width + 1
            cell = (tile * height + (y % height)[:, None]) * width + x % width
            row = y - first
        else:  # the model's own tokens stand on a smaller map
            lines, wide = image.grids[1]
            row = (y - first) * lines // max(1, last - first)
            column = (x - west) * wide // max(1, east - west)
            cell = height * width + row[:, None] * wide + column
        line = newlines[row.clamp(max=max(0, last - first - 1))]
        return torch.cat([index[cell], line[:, None]], dim=1).flatten()

    def group(self) -> Tensor:
        """The output row that holds each image token [n], −1 where none does."""
        image, p = self.image, self.p
        (height, width), across = image.grid, image.tile_grid[1]
        top, bottom, left, right = self.windows
        first, last, west, east = self.cells
        newline, line = image.newline, image.newline.cumsum(0) - 1
        if image.grids is None:
            crop = (image.tile - 1).clamp(min=0)
            y = torch.where(newline, line + first, crop // across * height + image.row)
            x = crop % across * width + image.col
        else:
            lines, wide = image.grids[1]
            y = torch.where(newline, line, image.row)
            y = first + (2 * y + 1) * (last - first) // (2 * lines)
            x = west + (2 * image.col + 1) * (east - west) // (2 * wide)
        rows, columns = bottom - top, right - left
        y, x = y // p - top, torch.where(newline, columns, x // p - left)
        inside = (y >= 0) & (y < rows) & (x >= 0)
        patch = (image.tile > 0) & (image.row >= 0) & (x < columns)
        return torch.where(inside & (patch | newline), y * (columns + 1) + x, -1)
