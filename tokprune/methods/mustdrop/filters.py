"""Stages 2 and 3 of MustDrop, in the decoder: filters by text attention, and shrunk caches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    CachePolicy,
    DecoderRun,
    DecoderStage,
    KeepDecision,
    ScoringLayer,
    SequenceView,
)
from tokprune.methods.earlier_caches import keep_last_survivors
from tokprune.operators.mustdrop import filter_score, text_attention
from tokprune.operators.topk import rank

if TYPE_CHECKING:
    from tokprune.methods.mustdrop import MustDrop


@dataclass(frozen=True)
class Filtered:
    """One filter of a prefill: ``score`` [B, L] (at least 1 where the text protects a token),
    ``keep`` [B, L] and the ``sequence`` that they belong to, before the drop."""

    score: Tensor
    keep: Tensor
    sequence: SequenceView


class FilterStage(DecoderStage):
    def __init__(self, method: MustDrop) -> None:
        self.method, self.positions = method, method.new_positions
        self.prune_before = frozenset(method.steps)
        self.taps = frozenset(layer - 1 for layer in method.steps)
        self.has_cache_policy = method.cache_policy

    ahead = frozenset()

    def start(self) -> DecoderRun:
        return FilterRun(self.method)


class FilterRun(DecoderRun):
    def __init__(self, method: MustDrop) -> None:
        self.method = method
        self.score: Tensor | None = None
        #: the filters of this prefill, in layer order
        self.filters: list[Filtered] = []
        #: drops so far: the layer before which, and the old place of every survivor [B, L']
        self.drops: list[tuple[int, Tensor]] = []
        self._warned = False

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        self._warn(sequence)
        rows, real = sequence.text_rows()
        total = torch.zeros(sequence.column.shape, device=rows.device)
        peak = torch.zeros_like(total)
        if rows.shape[1]:
            for part, valid in attention.parts(rows, real):
                own, high = text_attention(attention.rows(part), valid, sequence.visual)
                total, peak = total + own, torch.maximum(peak, high)
        self.score = self._score(total, peak, sequence)

    def _score(self, total: Tensor, peak: Tensor, sequence: SequenceView) -> Tensor:
        """What the filter compares with 1, [B, L]: each image has shares of its own."""
        gamma, alpha = self.method.gamma, self.method.alpha
        if self.method.keep is not None and not (alpha and gamma):
            gamma = alpha = 1.0
        score = torch.zeros_like(total)
        for image in range(sequence.segments):
            own = sequence.segment == image
            share = filter_score(total.masked_fill(~own, 0.0), peak, gamma, alpha)
            score = torch.where(own, share, score)
        return score

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        if self.score is None:
            return None
        score = self.score.to(hidden.device)
        tag = sequence.tag if sequence.tag is not None else torch.zeros_like(sequence.visual)
        if self.method.keep is None:
            decision = KeepDecision(((score >= 1) | tag) & sequence.visual)
        else:
            # whole numbers: key tokens above all others, each kind by its score
            place = rank(score).argsort(-1)
            order = torch.where(tag, 2, 1) * place.shape[1] - place
            decision = KeepDecision.best(order, self._counts(layer, sequence), sequence)
        decision.positions = self.method.new_positions
        self.filters.append(Filtered(score, decision.mask, sequence))
        return decision

    def _counts(self, layer: int, sequence: SequenceView) -> list[list[int]]:
        step = self.method.steps.index(layer)
        wanted = sequence.counts_after(lambda tokens: self.method.count(step, tokens))
        # without text after its images, a sample keeps all
        rows = zip(wanted, sequence.counts, sequence.text_after)
        return [row if text else list(now) for row, now, text in rows]

    def _warn(self, sequence: SequenceView) -> None:
        silent = [
            b for b, text in enumerate(sequence.text_after) if not text and any(sequence.counts[b])
        ]
        if silent and not self._warned:
            self._warned = True
            warnings.warn(
                f"MustDrop: no text follows the image in batch row(s) {silent}: nothing can say "
                "which tokens matter, all are kept there",
                stacklevel=2,
            )

    def dropped(self, layer: int, index: Tensor) -> None:
        self.drops.append((layer, index))

    def after_prefill(self, sequences: Sequence[SequenceView]) -> CachePolicy | None:
        """Layers between the first filter and the last keep what is alive at the end."""
        steps = self.method.steps
        counted = self.method.counts_cache
        end = max((layer for layer, _ in self.drops), default=0)
        if counted and self.method.new_positions == "preserve":
            end = max(steps)  # the number of entries is another position even without a drop
        if not end:
            return None
        layers = range(min(steps) - 1, end)
        return keep_last_survivors(layers, self.drops, sequences, not counted)
