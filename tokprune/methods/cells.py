"""Tokens of an image by the cells of its tiles' grids."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.engine.contracts import ImageTokens, Positions, PromptStage, Selection
from tokprune.errors import CompositionError


def index_of_cells(image: ImageTokens) -> Tensor:
    """[tiles · H · W] long: where each cell stands among the image's tokens, −1 if nowhere; the
    cells of one tile's grid after the other."""
    if image.grids is None:
        height, width = image.grid
        number = image.tiles * height * width
        cell = (image.tile * height + image.row) * width + image.col
    else:
        sizes = [height * width for height, width in image.grids]
        number = sum(sizes)
        starts = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])
        both = torch.stack([starts, torch.tensor([width for _, width in image.grids])])
        both = both.to(image.tile.device, non_blocking=True)[:, image.tile.clamp(min=0)]
        cell = both[0] + image.row * both[1] + image.col
    cell = torch.where(image.row < 0, number, cell)  # newline and class tokens: a spare entry
    index = torch.full((number + 1,), -1, device=cell.device)
    return index.scatter(0, cell, torch.arange(image.count, device=cell.device))[:-1]


def rows_of_tiles(image: ImageTokens) -> list[Tensor]:
    """Rows [n] of the patches of every tile (or frame) that show the image, in raster order; tiles
    that show none of it are left out. Where an earlier method has dropped some, all that are left
    are one entry."""
    windows = image.windows()
    sizes = [(bottom - top) * (right - left) for top, bottom, left, right in windows]
    if image.count != image.original or sum(sizes) != image.patches:
        return [image.patch_rows()]
    grids = image.tile_grids()
    cells = index_of_cells(image).split([height * width for height, width in grids])
    return [
        own.view(grid)[top:bottom, left:right].flatten()
        for own, grid, (top, bottom, left, right), size in zip(cells, grids, windows, sizes)
        if size
    ]


def check_whole(image: ImageTokens, method: str) -> None:
    """Before a stage that works on whole grids.

    Raises:
        CompositionError: an earlier method has dropped or merged some of the image's tokens.
    """
    if image.count != image.original:
        raise CompositionError(
            f"{method} needs the whole grid of every tile, and an earlier method has already "
            f"dropped or merged patches ({image.count} of {image.original} tokens are left); leave "
            "one of them out"
        )


def keep_on_grid(image: ImageTokens, stay: Tensor, dropped: int) -> Tensor:
    """Tokens ``stay`` [k] (long, in any order) and all that stand on no cell (newline and class
    tokens), in prompt order: [count − dropped] long. ``dropped``: tokens on cells that go (host).
    """
    alive = (image.row < 0).scatter(0, stay, torch.ones_like(stay, dtype=torch.bool))
    return (~alive).to(torch.int8).sort(stable=True).indices[: image.count - dropped]


@dataclass(frozen=True, eq=False)
class MergedTile:
    """What is left of a tile of n cells."""

    #: [k, D] tokens, and the cell [k] that each stands for (long)
    features: Tensor
    cells: Tensor
    #: [n] long: the token that holds each cell, −1 where none does
    group: Tensor
    #: [n] how much of each cell is in it; None: a token is the mean of its cells
    weight: Tensor | None = None


def merged_tiles(
    image: ImageTokens, places: Sequence[Tensor], tiles: Sequence[MergedTile], in_order: bool
) -> Selection:
    """The selection of an image whose tiles were merged each for itself; newline tokens go.

    Args:
        image: as it was.
        places: of every tile the rows [n] of the image that stand on its cells.
        tiles: what is left of them.
        in_order: tokens enter by the place of their cells, not tile by tile as they are.
    """
    index = torch.cat([place[tile.cells] for place, tile in zip(places, tiles)])
    features = torch.cat([tile.features for tile in tiles])
    group, start = torch.full((image.count,), -1, device=index.device), 0
    weighted = any(tile.weight is not None for tile in tiles)
    weight = torch.ones(image.count, device=index.device) if weighted else None
    for place, tile in zip(places, tiles):
        group[place] = torch.where(tile.group < 0, -1, tile.group + start)
        start += len(tile.cells)
        if weight is not None and tile.weight is not None:
            weight[place] = tile.weight
    if in_order:
        order = index.argsort(stable=True)
        index, features = index[order], features[order]
        moved = torch.empty_like(order)
        moved = moved.scatter(0, order, torch.arange(len(order), device=order.device))
        group = torch.where(group < 0, -1, moved[group.clamp(min=0)])
    return Selection(index, features, group, weight)


class CellMerger(PromptStage):
    """Merges the tokens of every tile or frame, each for itself.

    Args:
        method: who merges, for errors.
        videos_only: stills are left as they are.
        in_order: see :func:`merged_tiles`.
    """

    def __init__(
        self, method: str, positions: Positions, videos_only: bool, in_order: bool
    ) -> None:
        self.name, self.positions = method, positions
        self.videos_only, self.in_order = videos_only, in_order

    @abstractmethod
    def budget(self, cells: int, tiles: int) -> int | None:
        """Tokens to leave of each of ``tiles`` tiles of so many cells; None: the tiles decide."""

    @abstractmethod
    def merge(self, image: ImageTokens, place: Tensor, keep: int | None) -> list[MergedTile]:
        """What is left of tiles of equally many cells, ``place`` [b, n] in the image's tokens."""

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return [self._one(image) for image in images]

    def _one(self, image: ImageTokens) -> Selection | None:
        if self.videos_only and not image.video:
            return None
        sizes = [height * width for height, width in image.tile_grids()]
        budgets = [self.budget(size, len(sizes)) for size in sizes]
        if budgets == sizes:
            return None
        check_whole(image, self.name)
        places = index_of_cells(image).split(sizes)
        found: dict[int, MergedTile] = {}
        for size in set(sizes):
            members = [tile for tile, own in enumerate(sizes) if own == size]
            place, keep = torch.stack([places[tile] for tile in members]), budgets[members[0]]
            if keep == size:
                cells = torch.arange(size, device=place.device)
                made = [MergedTile(image.features[own], cells, cells) for own in place]
            else:
                made = self.merge(image, place, keep)
            found.update(zip(members, made, strict=True))
        tiles = [found[tile] for tile in range(len(sizes))]
        return merged_tiles(image, places, tiles, self.in_order)
