"""PruMerge at the language-model input, where the model makes one token of several patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import ImageTokens
from tokprune.methods.cells import CellMerger, MergedTile
from tokprune.methods.prumerge.tower import merge_tiles

if TYPE_CHECKING:
    from tokprune.methods.prumerge import PruMerge


class CellStage(CellMerger):
    """Merges the tokens of every tile or frame."""

    def __init__(self, method: PruMerge, videos_only: bool = False) -> None:
        super().__init__(
            method.name, method.new_positions, videos_only, in_order=method.order == "spatial"
        )
        self.method = method

    def budget(self, cells: int, tiles: int) -> int | None:
        return self.method.budget(cells, tiles)

    def merge(self, image: ImageTokens, place: Tensor, keep: int | None) -> list[MergedTile]:
        assert image.score is not None
        assert image.metric is not None
        score = image.score[place].float()
        score = score / score.sum(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
        new = merge_tiles(self.method, image.features[place], image.metric[place], score, keep)
        tiles = []
        for i, count in enumerate(new.counts):
            weight = torch.where(new.group[i] == count - 1, score[i], 1.0)
            tiles.append(MergedTile(new.out[i, :count], new.rows[i, :count], new.group[i], weight))
        return tiles
