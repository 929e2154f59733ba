"""A budget for every tile of an image, by where the base tile is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tokprune.operators.budgets import limit_budgets, proportional_budgets
from tokprune.operators.checks import check_choice
from tokprune.operators.topk import rank

__all__ = ["Rounding", "band_regions", "crop_budgets", "crop_regions", "split_budget"]

Rounding = Literal["remainder", "floor"]


def split_budget(total: int, alpha: float, base: int, crops: int) -> tuple[int, int]:
    """Tokens of the base tile, ⌊total · α⌋ of them, and of all crops; both no more than there are.

    Args:
        total: tokens of the image to keep.
        alpha: share of the base tile, 0…1.
        base, crops: tokens that the base tile and all crops together have.

    Source: HiRED, arXiv 2408.10945, official code.
    """
    own = min(int(total * alpha), base)
    return own, min(total - own, crops)


def band_regions(cells: int, crops: int) -> Tensor:
    """Which crop each cell of the base tile decides on: consecutive pieces of its raster, as in
    the official code: bands of rows, whatever the crops show.

    Args:
        cells: N of the base tile.
        crops: number of crops.

    Returns:
        [N] long in 0…crops−1 (host).

    Source: HiRED, arXiv 2408.10945, official code.
    """
    return torch.arange(cells) * crops // cells


def crop_regions(
    grid: tuple[int, int], tile_grid: tuple[int, int],
    windows: Sequence[tuple[int, int, int, int]],
) -> Tensor:  # fmt: skip
    """Which crop shows each cell of the base tile, by the cell's middle.

    The base tile holds the whole image and no padding; the crops hold it as their windows say.

    Args:
        grid: (height, width) of the base tile.
        tile_grid: crops (down, across).
        windows: (top, bottom, left, right) per crop, row by row, half open: cells that show the
            image (``tile_windows`` without the base tile).

    Returns:
        [height · width] long in 0…crops−1 (host).

    Raises:
        ValueError: there are not down · across windows.

    Source: ours.
    """
    down, across = tile_grid
    if len(windows) != down * across:
        raise ValueError(
            f"windows has {len(windows)} entries; with tile_grid={tile_grid} it should have "
            f"{down * across}"
        )
    most = [max(windows[y * across + x][1] - windows[y * across + x][0] for x in range(across))
            for y in range(down)]  # fmt: skip
    wide = [max(windows[y * across + x][3] - windows[y * across + x][2] for y in range(down))
            for x in range(across)]  # fmt: skip
    row, column = _part(grid[0], most), _part(grid[1], wide)
    return (row[:, None] * across + column).flatten()


def _part(cells: int, lengths: Sequence[int]) -> Tensor:
    """Which of consecutive parts of such lengths the middle of each of so many cells is in."""
    ends = torch.tensor(lengths).cumsum(0)
    middle = (2 * torch.arange(cells) + 1) * ends[-1]
    return torch.searchsorted(2 * cells * ends, middle, right=True)


def crop_budgets(
    first: Tensor,
    region: Tensor,
    limits: Sequence[int],
    total: int,
    alpha: float,
    rounding: Rounding = "remainder",
) -> Tensor:
    """Tokens of every crop, in proportion to the marked cells of its region: the ⌊N(1 − α)⌋ cells
    of the base tile that are looked at most. Without any mark the crops share evenly.

    Args:
        first: [B, N] attention on the base tile's cells in the encoder's first layer, any float
            dtype.
        region: [N] long in 0…C−1, the crop of each cell.
        limits: tokens that each of the C crops has (host).
        total: tokens of all crops together.
        alpha: share of the base tile, 0…1.
        rounding: "remainder" hands out the whole total: by largest remainders, and what a crop
            cannot hold to others, most marks first (ours); "floor" loses both, as the official
            code does.

    Returns:
        [B, C] long.

    Raises:
        ValueError: shapes do not match, unknown ``rounding``.

    Source: HiRED, arXiv 2408.10945, official code.
    """
    check_choice("rounding", rounding, Rounding)
    cells = first.shape[-1]
    if region.shape != (cells,):
        raise ValueError(f"region has shape {tuple(region.shape)}; it should be ({cells},)")
    marks = int(cells * (1 - alpha))
    region = region.to(first.device, non_blocking=True)
    marked = region[rank(first)[:, :marks]]
    count = marked.new_zeros(len(first), len(limits))
    count = count.scatter_add(1, marked, torch.ones_like(marked)) if marks else count + 1
    most = torch.tensor(limits).to(first.device, non_blocking=True).expand_as(count)
    if rounding == "floor":
        share = count / count.sum(-1, keepdim=True)
        return (share * total).long().minimum(most)
    return limit_budgets(proportional_budgets(count, total), most, count, total)
