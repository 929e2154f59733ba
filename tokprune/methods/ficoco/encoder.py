"""FiCoCo-V: merges between attention and MLP of encoder layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    Reduction,
    TowerInput,
    TowerTokens,
)
from tokprune.methods.tower_rows import behind_class_token
from tokprune.operators.ficoco import (
    compress,
    head_mean,
    most_targets,
    patch_redundancy,
    penalise,
    soft_targets,
)
from tokprune.operators.topk import rank

if TYPE_CHECKING:
    from tokprune.methods.ficoco import FiCoCo


class EncoderMerge(EncoderStage):
    """Merges ``removed[layer]`` patches of every tile in each of these layers."""

    def __init__(self, method: FiCoCo, removed: Mapping[int, int]) -> None:
        self.method, self.removed = method, removed
        self.taps = self.between_layers = frozenset(removed)
        self.order, self.positions = method.order, method.new_positions

    def start(self, tower: TowerInput) -> EncoderRun:
        return _EncoderRun(self, tower.facts.grid)


class _EncoderRun(EncoderRun):
    def __init__(self, stage: EncoderMerge, grid: tuple[int, int]) -> None:
        self.stage, self.grid = stage, grid
        #: vectors [B, T, C] whose products are the layer's head-averaged logits
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        #: [B, H·W] cells that the local penalty has chosen
        self.closed: Tensor | None = None

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        self.query, self.key = head_mean(attention.query, attention.key, attention.scaling)

    def between(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        first, method = tokens.first_patch, self.stage.method
        r = self.stage.removed[layer]
        assert self.query is not None
        assert self.key is not None
        query, key = self.query[:, first:], self.key[:, first:]
        score = self._score(query, key, tokens)
        order = rank(-score)
        merged = order[:, :r]
        kept = order[:, r:].sort(dim=1).values
        stays = torch.ones_like(score, dtype=torch.bool)
        stays = stays.scatter(1, merged, torch.zeros_like(merged, dtype=torch.bool))
        rows = query.gather(1, merged[:, :, None].expand(-1, -1, query.shape[2])) @ key.mT
        most = most_targets(kept.shape[1], method.quantile)
        targets, shares = soft_targets(rows, stays, method.quantile, most)
        mixed = compress(hidden[:, first:], merged, targets, shares)
        place = stays.cumsum(1) - 1
        group = place.scatter(1, merged, place.gather(1, targets[:, :, 0]))
        patches = mixed.gather(1, kept[:, :, None].expand(-1, -1, mixed.shape[2]))
        return behind_class_token(hidden, first, Reduction(kept, patches, group))

    def _score(self, query: Tensor, key: Tensor, tokens: TowerTokens) -> Tensor:
        """[B, n] small is redundant; the mean over patches of products is the product of means."""
        assert self.query is not None
        query_mean, key_mean = query.mean(1, keepdim=True), key.mean(1, keepdim=True)
        among = (query @ key_mean.mT)[:, :, 0]
        asking = self.query[:, :1] if tokens.has_cls else query_mean
        row = (asking @ key.mT)[:, 0]
        score = patch_redundancy(row, among, self.stage.method.beta)
        slots = tokens.slots[:, tokens.first_patch :]
        if self.closed is None:
            cells = self.grid[0] * self.grid[1]
            self.closed = torch.zeros(len(slots), cells, dtype=torch.bool, device=slots.device)
        score, self.closed = penalise(score, slots, self.closed.to(slots.device), self.grid)
        return score

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        # A merged row on a cell that the packing crops away may hold cells that it shows.
        return EncoderOutcome(unpad=False)
