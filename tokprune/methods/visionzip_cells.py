"""VisionZip where the model merges patches after its tower: the tower is looked at, and tokens are
kept and merged at the language-model input, as the authors do for Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    PromptStage,
    Selection,
    TowerInput,
    TowerTokens,
)
from tokprune.methods.cells import MergedTile, check_whole, index_of_cells, merged_tiles
from tokprune.operators.visionzip import Score, compress

if TYPE_CHECKING:
    from tokprune.methods.visionzip import VisionZip


class KeysAndAttention(EncoderStage):
    """Observes, in one layer, how much attention every patch receives, and its keys."""

    def __init__(self, layer: int, score: Score) -> None:
        self.taps, self.score = frozenset({layer}), score

    @property
    def share_key(self) -> Hashable:
        return "keys and attention", self.score, *self.taps

    def start(self, tower: TowerInput) -> EncoderRun:
        return _ObservingRun(self.score)


class _ObservingRun(EncoderRun):
    def __init__(self, score: Score) -> None:
        self.score, self.outcome = score, EncoderOutcome()

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        if tokens.has_cls and self.score == "cls":
            score = attention.cls_row().sum(1)
        else:
            score = attention.received(others_only=True)
        first = tokens.first_patch
        metric = attention.key.float().mean(1)
        self.outcome = EncoderOutcome(score=score[:, first:], metric=metric[:, first:])

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return self.outcome


class CellStage(PromptStage):
    """Keeps the cells of most attention in every tile or frame, and merges the others."""

    def __init__(self, method: VisionZip) -> None:
        self.method, self.positions = method, method.new_positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return [self._one(image) for image in images]

    def _one(self, image: ImageTokens) -> Selection | None:
        height, width = image.grid
        dominant, contextual = self.method.split_of(height * width, image.tiles)
        if dominant + contextual >= height * width:
            return None
        check_whole(image, self.method.name)
        assert image.score is not None
        assert image.metric is not None
        place = index_of_cells(image).view(image.tiles, -1)
        new = compress(
            image.features[place], image.metric[place], image.score[place], dominant, contextual,
            class_token=False,
        )  # fmt: skip
        weights = self._weights(new.group, new.rows)
        tiles = [MergedTile(*own) for own in zip(new.out, new.rows, new.group, weights)]
        return merged_tiles(image, list(place), tiles, in_order=self.method.order == "spatial")

    @staticmethod
    def _weights(group: Tensor, rows: Tensor) -> Tensor:
        """Of every cell [tiles, n]: 1 where it stands for its group, 1 over the others of the group
        where it is merged into one."""
        size = torch.zeros_like(rows, dtype=torch.float)
        size = size.scatter_add(1, group.clamp(min=0), (group >= 0).float())
        share = 1 / (size - 1).clamp(min=1).gather(1, group.clamp(min=0))
        return share.scatter(1, rows, torch.ones_like(size))
