"""TRIM behind the layer that the model reads, before the projector, as published."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokprune.engine.contracts import (
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    Reduction,
    TowerInput,
    TowerTokens,
)
from tokprune.methods.clip_relevance import ClipRelevance
from tokprune.methods.tower_rows import (
    Window,
    behind_class_token,
    cells_of,
    check_equal_rows,
    shown_windows,
    stitched_key,
)
from tokprune.methods.trim.tiles import Alike, Squeezed, squeeze

if TYPE_CHECKING:
    from tokprune.methods.trim import TRIM


class TowerStage(EncoderStage):
    """``pooled_videos``: frames are pooled behind the tower, which is then only looked at."""

    def __init__(
        self, method: TRIM, relevance: ClipRelevance, layer: int, pooled_videos: bool
    ) -> None:
        self.method, self.relevance, self.pooled_videos = method, relevance, pooled_videos
        self.after_layers, self.positions = frozenset({layer}), method.new_positions
        self.order = "published"
        self.across = "call" if method.outliers == "call" else "tile"

    @property
    def reduces_videos(self) -> bool:
        return not self.pooled_videos

    def start(self, tower: TowerInput) -> EncoderRun:
        return _Run(self, tower)


class _Run(EncoderRun):
    def __init__(self, stage: TowerStage, tower: TowerInput) -> None:
        self.stage, self.tower = stage, tower
        self.looks = stage.pooled_videos and tower.has_videos
        self.score: Tensor | None = None
        #: [B] the slot that stands for the mean of each tile, −2 without one
        self.mean_slot: Tensor | None = None
        #: patches of padding are known to be none of those kept
        self.no_padding = False

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        check_equal_rows(tokens, self.stage.method.name)
        first = tokens.first_patch
        patches = hidden[:, first:]
        similarity = self.stage.relevance.product(patches, self.tower)
        if self.looks:
            self.score = similarity
            return None
        tiles, n = patches.shape[:2]
        done = squeeze(self.stage.method, self._groups(patches, similarity))
        if all(len(own.kept) == n for own in done.values()) and len(done) == tiles:
            return None
        slots = tokens.slots[:, first:]
        self.mean_slot = torch.full((tiles,), -2, device=slots.device)
        counts = [0] * tiles
        for tile, own in done.items():
            counts[tile] = len(own.kept) + (own.mean is not None)
        reduction = self._reduction(patches, done, counts)
        for tile, own in done.items():
            if own.mean is not None:
                self.mean_slot[tile] = slots[tile, own.others[-1]]
        return behind_class_token(hidden, first, reduction)

    def _groups(self, patches: Tensor, similarity: Tensor) -> list[Alike]:
        """Tiles by the cells of theirs that show the image."""
        facts, (tiles, n) = self.tower.facts, patches.shape[:2]
        shown: list[Window | None] = [None] * tiles
        if facts.tiled and n == facts.patches:
            shown, self.no_padding = shown_windows(self.tower), True
        same: dict[Window | None, list[int]] = {}
        for tile, window in enumerate(shown):
            same.setdefault(window, []).append(tile)
        groups = []
        for window, members in same.items():
            own = torch.arange(n) if window is None else cells_of(window, facts.grid[1])
            if not len(own):
                continue  # padding alone
            own = own.to(patches.device, non_blocking=True)
            at = torch.tensor(members).to(patches.device, non_blocking=True)
            images = [self.tower.image_of_tile[tile] for tile in members]
            numbers = [self.tower.tiles_per_image[image] for image in images]
            rows = own.expand(len(members), -1)
            groups.append(
                Alike(members, numbers, rows, patches[at][:, own], similarity[at][:, own])
            )
        return groups

    @staticmethod
    def _reduction(patches: Tensor, done: dict[int, Squeezed], counts: list[int]) -> Reduction:
        """Kept patches, then the mean; padding at the end of tiles that keep fewer."""
        tiles, n, width = patches.shape
        rows = torch.full((tiles, max(counts)), -1, device=patches.device)
        hidden = patches.new_zeros(*rows.shape, width)
        group = torch.full((tiles, n), -1, device=patches.device)
        for tile, own in done.items():
            k = len(own.kept)
            rows[tile, :k], hidden[tile, :k] = own.kept, patches[tile, own.kept]
            group[tile, own.kept] = torch.arange(k, device=patches.device)
            if own.mean is not None:
                rows[tile, k], hidden[tile, k] = own.others[-1], own.mean
                group[tile, own.others] = k
        return Reduction(rows, hidden, group, counts if min(counts) < max(counts) else None)

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        facts = self.tower.facts
        if self.looks or self.mean_slot is None:
            return EncoderOutcome(score=self.score)
        if not facts.tiled:
            return EncoderOutcome(unpad=False)
        # the base tile, the stitched crops, the means, class tokens where the model keeps them
        block = facts.max_tiles * facts.patches
        slots = tokens.slots[:, tokens.first_patch :]
        key = stitched_key(slots, self.tower)
        tile = torch.arange(len(key), device=key.device)[:, None]
        key = torch.where(slots == self.mean_slot[:, None], 2 * block + tile, key)
        key = pad(key, (1, 0), value=3 * block) if facts.cls_in_features else key
        return EncoderOutcome(key=key, unpad=not self.no_padding)
