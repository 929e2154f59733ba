"""PruMerge at the language-model input, where the model makes one token of several patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from tokprune.engine.contracts import ImageTokens, PromptStage, Selection
from tokprune.methods.cells import check_whole, index_of_cells
from tokprune.methods.prumerge.tower import merge_tiles

if TYPE_CHECKING:
    from tokprune.methods.prumerge import PruMerge

#: tokens of a tile, and the row of the image that each stands for; of each of the tile's cells the
#: token that holds it, and how much of it is there
Tile: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor]"


class CellStage(PromptStage):
    """Merges the tokens of every tile or frame."""

    def __init__(self, method: PruMerge, videos_only: bool = False) -> None:
        self.method, self.positions, self.videos_only = method, method.new_positions, videos_only

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return [self._one(image) for image in images]

    def _one(self, image: ImageTokens) -> Selection | None:
        if self.videos_only and not image.video:
            return None
        grids = image.tile_grids()
        sizes = [height * width for height, width in grids]
        budgets = [self.method.budget(size, len(grids)) for size in sizes]
        if budgets == sizes:
            return None
        check_whole(image, self.method.name)
        assert image.score is not None
        assert image.metric is not None
        places = index_of_cells(image).split(sizes)
        alike: dict[int, list[int]] = {}
        for tile, size in enumerate(sizes):
            alike.setdefault(size, []).append(tile)
        found: dict[int, Tile] = {}
        for size, members in alike.items():
            place = torch.stack([places[tile] for tile in members])
            keep, features = budgets[members[0]], image.features[place]
            if keep == size:
                own = torch.arange(size, device=place.device)
                for i, tile in enumerate(members):
                    found[tile] = features[i], place[i], own, torch.ones_like(own).float()
                continue
            score = image.score[place].float()
            score = score / score.sum(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
            new = merge_tiles(self.method, features, image.metric[place], score, keep)
            for i, (tile, count) in enumerate(zip(members, new.counts)):
                weight = torch.where(new.group[i] == count - 1, score[i], 1.0)
                at = place[i].gather(0, new.rows[i, :count])
                found[tile] = new.out[i, :count], at, new.group[i], weight
        return self._selection(image, places, [found[tile] for tile in range(len(sizes))])

    def _selection(
        self, image: ImageTokens, places: Sequence[Tensor],
        found: Sequence[Tile],
    ) -> Selection:  # fmt: skip
        features, index = (torch.cat([tile[i] for tile in found]) for i in (0, 1))
        group, start = torch.full((image.count,), -1, device=index.device), 0
        weight = torch.ones(image.count, device=index.device)
        for place, (_, at, inside, own) in zip(places, found):
            group[place] = torch.where(inside < 0, -1, inside + start)
            weight[place], start = own, start + len(at)
        if self.method.order == "spatial":
            order = index.argsort(stable=True)
            index, features = index[order], features[order]
            moved = torch.empty_like(order).scatter(
                0, order, torch.arange(len(order), device=order.device)
            )
            group = torch.where(group < 0, -1, moved[group.clamp(min=0)])
        return Selection(index, features, group, weight)
