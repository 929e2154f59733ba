"""ApET before the projector, or at the language-model input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    PromptStage,
    Reduction,
    Selection,
    TowerInput,
    TowerTokens,
)
from tokprune.errors import CompositionError
from tokprune.methods.cells import MergedTile, check_whole, index_of_cells, merged_tiles
from tokprune.methods.tower_rows import behind_class_token

if TYPE_CHECKING:
    from tokprune.methods.apet import ApET


class TowerStage(EncoderStage):
    """Merges patches behind the layer that the model reads; not of videos whose frames are pooled
    after it."""

    def __init__(self, method: ApET, layer: int, keep: int, pooled_videos: bool) -> None:
        self.method, self.keep, self.pooled_videos = method, keep, pooled_videos
        self.after_layers = frozenset({layer})
        self.order, self.positions = method.order, method.new_positions

    @property
    def reduces_videos(self) -> bool:
        return not self.pooled_videos

    def start(self, tower: TowerInput) -> EncoderRun:
        if self.pooled_videos and tower.has_videos:
            return EncoderRun()
        return _TowerRun(self.method, self.keep)


class _TowerRun(EncoderRun):
    def __init__(self, method: ApET, keep: int) -> None:
        self.method, self.keep = method, keep

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        if tokens.valid is not None:
            raise CompositionError(
                f"{self.method.name} needs tiles of equally many patches, and an earlier method "
                "has left some tiles fewer than others; leave one of them out"
            )
        first = tokens.first_patch
        patches = hidden[:, first:]
        if self.keep >= patches.shape[1]:
            return None
        new = self.method.compress(patches, self.keep, "door")
        return behind_class_token(hidden, first, Reduction(new.index, new.out, new.group))

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return EncoderOutcome(unpad=False)


class CellStage(PromptStage):
    """Merges the tokens of every tile or frame."""

    def __init__(self, method: ApET, videos_only: bool = False) -> None:
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
        places = index_of_cells(image).split(sizes)
        found: dict[int, MergedTile] = {}
        for size in set(sizes):
            members = [tile for tile, own in enumerate(sizes) if own == size]
            features = image.features[torch.stack([places[tile] for tile in members])]
            keep = budgets[members[0]]
            for i, tile in enumerate(members):
                cells = torch.arange(size, device=features.device)
                found[tile] = MergedTile(features[i], cells, cells)
            if keep < size:
                new = self.method.compress(features, keep, "qwen")
                for i, tile in enumerate(members):
                    found[tile] = MergedTile(new.out[i], new.index[i], new.group[i])
        tiles = [found[tile] for tile in range(len(sizes))]
        return merged_tiles(image, places, tiles, in_order=self.method.order == "spatial")
