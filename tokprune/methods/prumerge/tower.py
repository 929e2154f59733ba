"""PruMerge inside the vision encoder: what is seen of its last layer, and the merge behind it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    Reduction,
    TowerFacts,
    TowerInput,
    TowerTokens,
)
from tokprune.methods.tower_rows import behind_class_token, check_equal_rows
from tokprune.operators.prumerge import cls_attention, merge

if TYPE_CHECKING:
    from tokprune.methods.prumerge import PruMerge


@dataclass(frozen=True, eq=False)
class Merged:
    """Tiles after the merge, padded at the end to the longest."""

    #: [B, M, D] merged tokens, the extra one last, and the patch [B, M] that each stands for (−1:
    #: padding)
    out: Tensor
    rows: Tensor
    #: [B, N] long: the token that holds each patch, −1 where none does
    group: Tensor
    #: tokens of each tile (host)
    counts: list[int]


def merge_tiles(
    method: PruMerge, hidden: Tensor, key: Tensor, attn: Tensor, keep: int | None
) -> Merged:
    """Patches [B, N, D] with keys [B, N, C] and attention [B, N], merged; ``keep``: tokens of each
    tile, None: the tiles decide."""
    order, counts = method.choose(attn, keep)
    alike: dict[int, list[int]] = {}
    for tile, count in enumerate(counts):
        alike.setdefault(count, []).append(tile)
    parts = []
    for count, tiles in alike.items():
        own = hidden, key, attn, order
        if len(alike) > 1:
            at = torch.tensor(tiles).to(order.device, non_blocking=True)
            own = hidden[at], key[at], attn[at], order[at]
        out = merge(*own, count, method.neighbours)
        parts.append((tiles, (out, *_holders(own[3], own[2], count))))
    if len(parts) == 1:
        return Merged(*parts[0][1], [count + 1 for count in counts])
    most = max(counts) + 1
    result = (
        hidden.new_zeros(len(hidden), most, hidden.shape[2]),
        order.new_full((len(hidden), most), -1),
        torch.empty_like(order),
    )
    for tiles, part in parts:
        at = torch.tensor(tiles).to(order.device, non_blocking=True)
        for whole, own_part in zip(result, part):
            whole[at, : own_part.shape[1]] = own_part
    return Merged(*result, [count + 1 for count in counts])


def _holders(order: Tensor, attn: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The patch [B, count + 1] that each token stands for, for the extra one that of most attention
    in it; and the token [B, N] that holds each patch."""
    chosen, rest = order[:, :count], order[:, count:]
    extra = rest.gather(1, attn.gather(1, rest).argmax(1, keepdim=True))
    none = torch.full_like(order, count + 1)
    group = none.scatter(1, rest, torch.full_like(rest, count))
    number = torch.arange(count, device=order.device).expand_as(chosen)
    group = group.scatter_reduce(1, chosen, number, "amin")
    return torch.cat([chosen, extra], dim=1), group.masked_fill(group > count, -1)


class _Looking(EncoderRun):
    """Attention [B, N] of the class token and keys [B, N, C], the channels as one head."""

    def __init__(self, method: PruMerge) -> None:
        self.method = method
        self.score: Tensor | None = None
        self.key: Tensor | None = None

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        first = tokens.first_patch
        key = attention.key.transpose(1, 2).flatten(2)
        if tokens.has_cls and self.method.score == "cls":
            self.score = cls_attention(attention.query[:, :, 0].flatten(1), key)
        else:
            self.score = attention.received(others_only=True)[:, first:]
        self.key = key[:, first:]

    def seen(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and attention, where they are needed."""
        assert self.key is not None
        assert self.score is not None
        return self.key.to(device), self.score.to(device)


class ObserverStage(EncoderStage):
    """Looks at a tower whose rows do not change."""

    def __init__(self, method: PruMerge, tower: TowerFacts) -> None:
        self.method, self.taps = method, frozenset({tower.encoder_layers - 1})

    @property
    def share_key(self) -> Hashable:
        return "single-head attention and keys", self.method.score, *self.taps

    def start(self, tower: TowerInput) -> EncoderRun:
        return _Observing(self.method)


class _Observing(_Looking):
    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        assert self.key is not None
        return EncoderOutcome(score=self.score, metric=self.key.float())


class TowerStage(ObserverStage):
    """Merges what the model reads, once the last layer has run; of videos whose frames are pooled
    after it, it only looks at them."""

    def __init__(
        self, method: PruMerge, tower: TowerFacts, layer: int, keep: int | None,
        pooled_videos: bool,
    ) -> None:  # fmt: skip
        super().__init__(method, tower)
        self.keep, self.pooled_videos, self.after_tower = keep, pooled_videos, layer
        self.order, self.positions = method.order, method.new_positions
        self.across = "call" if method.ratio_scope == "call" else "tile"

    @property
    def share_key(self) -> None:
        return None

    @property
    def reduces_videos(self) -> bool:
        return not self.pooled_videos

    def start(self, tower: TowerInput) -> EncoderRun:
        if self.pooled_videos and tower.has_videos:
            return _Observing(self.method)
        return _Merging(self.method, self.keep)


class _Merging(_Looking):
    def __init__(self, method: PruMerge, keep: int | None) -> None:
        super().__init__(method)
        self.keep = keep

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        first = tokens.first_patch
        patches = hidden[:, first:]
        check_equal_rows(tokens, self.method.name)
        if self.keep is not None and self.keep >= patches.shape[1]:
            return None
        new = merge_tiles(self.method, patches, *self.seen(hidden.device), self.keep)
        ragged = new.counts if len(set(new.counts)) > 1 else None
        return behind_class_token(hidden, first, Reduction(new.rows, new.out, new.group, ragged))

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return EncoderOutcome(unpad=False)
