"""PruneSID's stage in the vision encoder: the class token and patches, group after group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    Reduction,
    TowerInput,
    TowerTokens,
)
from tokprune.engine.model import TowerFacts
from tokprune.methods.tiles import feature_layer
from tokprune.methods.tower_rows import check_equal_rows, stitched_places

if TYPE_CHECKING:
    from tokprune.methods.prunesid import PruneSID


class GroupStage(EncoderStage):
    """Keeps ``count`` tokens of every tile behind the layer that the model reads."""

    def __init__(
        self, method: PruneSID, tower: TowerFacts, count: int, pooled_videos: bool
    ) -> None:
        self.method, self.count, self.pooled_videos = method, count, pooled_videos
        self.after_layers = frozenset({feature_layer(tower, "PruneSID")})
        if tower.has_cls and method.importance == "cls":
            self.taps = self.after_layers
        self.order, self.positions = method.order, method.new_positions

    @property
    def reduces_videos(self) -> bool:
        return not self.pooled_videos

    def start(self, tower: TowerInput) -> EncoderRun:
        if self.pooled_videos and tower.has_videos:
            return EncoderRun()
        return GroupRun(self, tower)


class GroupRun(EncoderRun):
    """What one call of the tower saw and chose."""

    def __init__(self, stage: GroupStage, tower: TowerInput) -> None:
        self.stage, self.tower = stage, tower
        self.seen: tuple[Tensor, TowerTokens] | None = None
        self.patches = 0

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        self.seen = self.stage.method.look(attention, tokens), tokens

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        check_equal_rows(tokens, self.stage.method.name)
        first, method, total = tokens.first_patch, self.stage.method, self.stage.count
        features = hidden[:, first:]
        own_cls = method.keep_cls and tokens.has_cls
        self.patches = min(total - int(own_cls), features.shape[1])
        score = None if self.seen is None else tokens.carry(*self.seen)
        rows = method.grouped(features, score, self.patches, total) + first
        rows = pad(rows, (first, 0))
        if own_cls and not self.tower.facts.cls_in_features:
            # The model cuts row 0 off, and the class token is to reach it: give it a copy.
            rows = pad(rows, (1, 0))
        new = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        # from the last row on, so that a class token is found where its copy is
        group = torch.full(tokens.slots.shape, -1, device=rows.device)
        group = group.scatter_reduce(1, rows, new, "amax")
        return Reduction(rows, group=group)

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        if not self.tower.facts.tiled:
            return EncoderOutcome(unpad=False)
        return EncoderOutcome(key=self._key(tokens), unpad=False)

    def _key(self, tokens: TowerTokens) -> Tensor:
        """Sort keys: the base tile as it is, the patches of all crops, their class tokens."""
        facts, patches = self.tower.facts, self.patches
        cells = tokens.slots[:, tokens.rows - patches :]
        if self.stage.method.crop_order == "published":
            cells = cells.sort(-1).values
        cut = int(tokens.has_cls and not facts.cls_in_features)
        before = tokens.rows - patches - cut
        block = facts.max_tiles * facts.patches + 1
        keys = []
        for base, places in stitched_places(cells, self.tower):
            keys.append(torch.arange(before + patches, device=cells.device).expand(len(base), -1))
            keys.append(pad(places + block, (before, 0), value=2 * block))
        return torch.cat(keys)
