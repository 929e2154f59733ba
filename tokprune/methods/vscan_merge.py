"""Stage 1 of VScan, at the language-model input: two scans of every tile, and one merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokprune.engine.contracts import ImageTokens, Positions, PromptStage, Selection
from tokprune.methods.base import resolve_keep
from tokprune.methods.cells import check_whole, index_of_cells
from tokprune.methods.options import Budget
from tokprune.operators.budgets import proportional_budgets
from tokprune.operators.vscan import LocalShares, grid_windows, merge_into, two_scans

#: grid of a tile, the cells of it that show the image (top, bottom, left, right), tokens to keep
_Kind = tuple[tuple[int, int], tuple[int, int, int, int], int]


class MergingStage(PromptStage):
    """Scans and merges each tile; those alike run together."""

    def __init__(
        self, method: str, keep: Budget, window: int, shares: LocalShares, positions: Positions
    ) -> None:
        self.method, self.keep, self.positions = method, keep, positions
        self.window, self.shares = window, shares

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return [self._one(image) for image in images]

    def _one(self, image: ImageTokens) -> Selection | None:
        windows, grids = image.windows(), image.tile_grids()
        sizes = [(bottom - top) * (right - left) for top, bottom, left, right in windows]
        keep = resolve_keep(self.keep, sum(sizes))
        if keep == sum(sizes):
            return None
        check_whole(image, self.method)
        cells = index_of_cells(image).split([height * width for height, width in grids])
        counts = proportional_budgets(torch.tensor([sizes]), keep)[0].tolist()
        alike: dict[_Kind, list[Tensor]] = {}
        for own, kind in zip(cells, zip(grids, windows, counts)):
            if kind[2]:
                alike.setdefault(kind, []).append(own)
        places, features, start = [], [], 0
        group = torch.full((image.count,), -1, device=image.features.device)
        for kind, members in alike.items():
            place, kept, out, inside = self._tiles(image, torch.stack(members), kind)
            number, rows = kept.shape
            tile = torch.arange(number, device=group.device)[:, None]
            group = group.scatter(0, place.flatten(), (start + tile * rows + inside).flatten())
            start += number * rows
            places.append(kept.flatten())
            features.append(out.flatten(0, 1))
        index = torch.cat(places)
        order = index.argsort()
        moved = torch.empty_like(order).scatter(0, order, torch.arange(start, device=order.device))
        group = torch.where(group < 0, -1, moved[group.clamp(min=0)])
        return Selection(index[order], torch.cat(features)[order], group, in_order=True)

    def _tiles(
        self, image: ImageTokens, cells: Tensor, kind: _Kind
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of tiles alike, ``cells`` [b, H·W]: tokens that show the image [b, n], those kept [b, K],
        their new vectors [b, K, D], and which of them holds each token [b, n]."""
        grid, (top, bottom, left, right), keep = kind
        seen = torch.arange(grid[0] * grid[1]).view(grid)[top:bottom, left:right].flatten()
        window = grid_windows(grid, self.window)
        number = int(window[-1]) + 1
        place = cells[:, seen.to(cells.device, non_blocking=True)]
        assert image.metric is not None
        shallow, deep = image.metric[place].unbind(-1)
        scans = two_scans(shallow, deep, window[seen], number, keep, self.shares)
        kept = torch.cat(scans, dim=1).sort(-1).values
        merged = merge_into(image.features[place], kept)
        return place, place.gather(1, kept), merged.out, merged.group
