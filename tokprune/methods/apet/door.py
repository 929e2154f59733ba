"""ApET before the projector, or at the language-model input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tokprune.engine.contracts import (
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    Reduction,
    TowerInput,
    TowerTokens,
)
from tokprune.methods.cells import CellMerger, MergedTile
from tokprune.methods.tower_rows import behind_class_token, check_equal_rows

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
        check_equal_rows(tokens, self.method.name)
        first = tokens.first_patch
        patches = hidden[:, first:]
        if self.keep >= patches.shape[1]:
            return None
        new = self.method.compress(patches, self.keep, "door")
        return behind_class_token(hidden, first, Reduction(new.index, new.out, new.group))

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return EncoderOutcome(unpad=False)


class CellStage(CellMerger):
    """Merges the tokens of every tile or frame."""

    def __init__(self, method: ApET, videos_only: bool = False) -> None:
        super().__init__(
            method.name, method.new_positions, videos_only, in_order=method.order == "spatial"
        )
        self.method = method

    def budget(self, cells: int, tiles: int) -> int:
        return self.method.budget(cells, tiles)

    def merge(self, image: ImageTokens, place: Tensor, keep: int | None) -> list[MergedTile]:
        assert keep is not None
        new = self.method.compress(image.features[place], keep, "qwen")
        return [MergedTile(*own) for own in zip(new.out, new.index, new.group)]
