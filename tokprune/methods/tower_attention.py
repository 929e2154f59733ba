"""What stages at the language-model input may know of the vision encoder: who is attended to."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    TowerFacts,
    TowerInput,
    TowerTokens,
)


def patch_attention(attention: Attention, tokens: TowerTokens) -> Tensor:
    """Attention [B, N] float32 that each patch gets from the class token, mean over heads; where
    the tower has none, mean over all queries."""
    if tokens.has_cls:
        return attention.cls_row().mean(1)[:, 1:]
    return attention.received()


def read_layer(facts: TowerFacts) -> int:
    """The encoder layer that the model reads; the last but one where it reads several."""
    layer = facts.feature_layer
    return max(0, facts.encoder_layers - 2) if layer is None else max(0, layer)


class PatchAttention(EncoderStage):
    """Observes the attention that patches receive in some layers, ascending: leaves that of the
    last as their score, and all of it [tiles, N, layers] as their metric."""

    def __init__(self, *layers: int) -> None:
        self.layers, self.taps = layers, frozenset(layers)

    @property
    def share_key(self) -> Hashable:
        return "patch attention", *self.layers

    def start(self, tower: TowerInput) -> EncoderRun:
        return _PatchAttentionRun(self.layers)


class _PatchAttentionRun(EncoderRun):
    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.seen: dict[int, tuple[Tensor, TowerTokens]] = {}

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        self.seen[layer] = patch_attention(attention, tokens), tokens

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        # another method may have dropped rows after the attention
        found = [tokens.carry(*self.seen[layer]) for layer in self.layers]
        return EncoderOutcome(score=found[-1], metric=torch.stack(found, dim=-1))
