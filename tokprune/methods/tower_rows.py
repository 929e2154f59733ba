"""Rows of the vision encoder: the class token in front, and crops stitched to one map."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokprune.engine.contracts import Reduction, TowerInput, TowerTokens
from tokprune.errors import CompositionError
from tokprune.operators.anyres import raster_position, tile_windows

#: (top, bottom, left, right) of cells on a grid, half open
Window = tuple[int, int, int, int]


def check_equal_rows(tokens: TowerTokens, method: str) -> None:
    """Before a stage that works on tiles of equally many patches.

    Raises:
        CompositionError: an earlier method has left some tiles fewer than others.
    """
    if tokens.valid is not None:
        raise CompositionError(
            f"{method} needs tiles of equally many patches, and an earlier method has left some "
            "tiles fewer than others; leave one of them out"
        )


def behind_class_token(hidden: Tensor, first: int, patches: Reduction) -> Reduction:
    """The reduction of all rows that does this to the patches and leaves the class token as it is.

    Args:
        hidden: [B, first + N, D] all rows.
        first: class tokens in front of the patches, 0 or 1.
        patches: reduction of ``hidden[:, first:]``.
    """
    if not first:
        return patches

    def shifted(rows: Tensor) -> Tensor:
        return pad(torch.where(rows < 0, -1, rows + first), (first, 0))

    merged, group, counts = patches.hidden, patches.group, patches.counts
    return Reduction(
        shifted(patches.rows),
        None if merged is None else torch.cat([hidden[:, :first], merged], dim=1),
        None if group is None else shifted(group),
        None if counts is None else [first + count for count in counts],
    )


def stitched_places(slots: Tensor, tower: TowerInput) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every image the slots of its base tile [1, K], and where those of its crops [tiles − 1, K]
    are on the map stitched from all crops, in raster order.

    Args:
        slots: [B, K] long, patch numbers inside each tile.
        tower: which image each tile belongs to.
    """
    start = 0
    for tiles, grid in zip(tower.tiles_per_image, tower.tile_grids):
        base, crops = slots[start : start + tiles].split([1, tiles - 1])
        start += tiles
        yield base, raster_position(crops, grid, tower.facts.grid[0]) if tiles > 1 else crops


def stitched_key(slots: Tensor, tower: TowerInput) -> Tensor:
    """Sort keys [B, K] that put the base tile of every image first, and then the patches of all its
    crops in raster order; below twice ``max_tiles × patches``. ``slots`` [B, K] as above, −1 for
    any patch that is not to be sorted."""
    block, keys = tower.facts.max_tiles * tower.facts.patches, []
    for base, places in stitched_places(slots.clamp(min=0), tower):
        keys += [base, places + block]
    return torch.cat(keys)


def shown_windows(tower: TowerInput) -> list[Window | None]:
    """Of every tile the cells that show the image and no padding; None: all of them (host)."""
    height, width = tower.facts.grid
    return [
        None if window == (0, height, 0, width) else window
        for grid, size in zip(tower.tile_grids, tower.sizes)
        for window in tile_windows((height, width), grid, size)
    ]


def cells_of(window: Window, width: int) -> Tensor:
    """Cells [n] in a window on a grid of ``width`` columns, in raster order (long, CPU)."""
    rows, columns = torch.arange(*window[:2]), torch.arange(*window[2:])
    return (rows[:, None] * width + columns).flatten()
