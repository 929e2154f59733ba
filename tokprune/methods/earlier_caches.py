"""Dropped tokens leave the caches of the layers before the drop as well, at the end of prefill."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.engine.contracts import CachePolicy, ModelFacts, Plan, SequenceView
from tokprune.methods.scoring import DecoderScorer, ScorerRun, ScorerStage


def keep_last_survivors(
    layers: Iterable[int],
    drops: Iterable[tuple[int, Tensor]],
    sequences: Sequence[SequenceView],
    continue_positions: bool = True,
) -> CachePolicy:
    """The caches of some layers cut to the tokens that are alive at the end of a prefill.

    Args:
        layers: to be cut.
        drops: the layer before which, and the old place of every survivor [B, L'], as
            ``DecoderRun.dropped`` is told.
        sequences: of every layer.
        continue_positions: as of :class:`CachePolicy`.
    """
    final, wanted = sequences[-1], set(layers)
    policy, by_layer = CachePolicy(continue_positions=continue_positions), dict(drops)
    arange = torch.arange(final.column.shape[1], device=final.column.device)
    place = arange.expand(final.column.shape)
    last = max([*wanted, *(layer - 1 for layer in by_layer)], default=-1)
    for layer in range(last, min(wanted, default=last + 1) - 1, -1):
        if (index := by_layer.get(layer + 1)) is not None:
            place = index.gather(1, place.to(index.device))
        if layer in wanted:
            policy.index[layer] = place.masked_fill(~final.valid.to(place.device), -1)
            policy.lengths[layer] = final.lengths
    return policy


@dataclass(frozen=True)
class CacheCuttingScorer(DecoderScorer):
    """A scorer whose drops may reach back into the caches of the layers that ran before them.

    The prompt itself is read as without it; answers are not. Layers of linear attention have no
    cache of tokens and keep what they read.

    Args:
        cut_earlier_caches: drop the tokens from those caches as well.
    """

    cut_earlier_caches: bool = False

    def plan(self, facts: ModelFacts) -> Plan:
        super().plan(facts)  # refuses what does not fit
        return Plan(decoder=(CacheCuttingStage(self, facts),))


class CacheCuttingStage(ScorerStage):
    """Runs such a scorer."""

    def __init__(self, method: CacheCuttingScorer, facts: ModelFacts) -> None:
        super().__init__(method)
        self.has_cache_policy = method.cut_earlier_caches
        layers = facts.attention_layers
        #: decoder layers with a cache of tokens
        self.cached = frozenset(range(facts.decoder_layers)) if layers is None else layers

    def start(self) -> CacheCuttingRun:
        return CacheCuttingRun(self.method, self.cached)


class CacheCuttingRun(ScorerRun):
    """One prefill of it."""

    def __init__(self, method: DecoderScorer, cached: frozenset[int]) -> None:
        super().__init__(method)
        self.cached = cached
        #: drops so far: the layer before which, and the old place of every survivor [B, L']
        self.drops: list[tuple[int, Tensor]] = []

    def dropped(self, layer: int, index: Tensor) -> None:
        self.drops.append((layer, index))

    def after_prefill(self, sequences: Sequence[SequenceView]) -> CachePolicy | None:
        if not self.drops:
            return None
        before = max(layer for layer, _ in self.drops)
        return keep_last_survivors(
            (layer for layer in self.cached if layer < before), self.drops, sequences
        )
