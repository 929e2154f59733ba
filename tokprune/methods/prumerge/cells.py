"""PruMerge at the language-model input, where the model makes one token of several patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tokprune.engine.contracts import ImageTokens, PromptStage, Selection
from tokprune.methods.cells import MergedTile, check_whole, index_of_cells, merged_tiles
from tokprune.methods.prumerge.tower import merge_tiles

if TYPE_CHECKING:
    from tokprune.methods.prumerge import PruMerge


class CellStage(PromptStage):
    """Merges the tokens of every tile or frame."""

    def __init__(self, method: PruMerge, videos_only: bool = False) -> None:
        self.method, self.positions, self.videos_only = method, method.new_positions, videos_only

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return [self._one(image) for image in images]

    def _one(self, image: ImageTokens) -> Selection | None:
        if self.videos_only and not image.video:
            return None
        sizes = [height * width for height, width in image.tile_grids()]
        budgets = [self.method.budget(size, len(sizes)) for size in sizes]
        if budgets == sizes:
            return None
        check_whole(image, self.method.name)
        assert image.score is not None
        assert image.metric is not None
        places = index_of_cells(image).split(sizes)
        found: dict[int, MergedTile] = {}
        for size in set(sizes):
            members = [tile for tile, own in enumerate(sizes) if own == size]
            place = torch.stack([places[tile] for tile in members])
            keep, features = budgets[members[0]], image.features[place]
            if keep == size:
                cells = torch.arange(size, device=place.device)
                found |= {t: MergedTile(features[i], cells, cells) for i, t in enumerate(members)}
                continue
            score = image.score[place].float()
            score = score / score.sum(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
            new = merge_tiles(self.method, features, image.metric[place], score, keep)
            for i, (tile, count) in enumerate(zip(members, new.counts)):
                weight = torch.where(new.group[i] == count - 1, score[i], 1.0)
                found[tile] = MergedTile(
                    new.out[i, :count], new.rows[i, :count], new.group[i], weight
                )
        tiles = [found[tile] for tile in range(len(sizes))]
        return merged_tiles(image, places, tiles, in_order=self.method.order == "spatial")
