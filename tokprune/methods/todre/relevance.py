"""Stage 2 of ToDRE, in the decoder: all visual tokens go once text and image ignore each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    DecoderRun,
    DecoderStage,
    KeepDecision,
    ScoringLayer,
    SequenceView,
)
from tokprune.operators.relevance import ratio_from_rows, should_drop


@dataclass(frozen=True)
class RelevanceCheck:
    """What stage 2 found before decoder layer ``layer`` (0-based), in the attention of the layer
    before it: the ratios and the decision per sample, [B] on the model's device; NaN ratios where
    there is nothing to compare."""

    layer: int
    alpha_tv: Tensor
    alpha_vt: Tensor
    drop: Tensor


class RelevanceStage(DecoderStage):
    def __init__(self, tau: float, layers: Sequence[int], depth: int) -> None:
        self.tau = tau
        self.taps = frozenset(layer - 1 for layer in layers)
        # after the last layer there is a decision, and nothing left to drop from
        self.prune_before = frozenset(layer for layer in layers if layer < depth)

    ahead = frozenset()

    def start(self) -> DecoderRun:
        return RelevanceRun(self.tau)


class RelevanceRun(DecoderRun):
    def __init__(self, tau: float) -> None:
        self.tau = tau
        #: the checks of this prefill, in layer order
        self.checks: list[RelevanceCheck] = []

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        if not any(map(any, sequence.counts)):
            return  # every sample has dropped its visual tokens
        tv, vt = _ratios(attention, sequence)
        self.checks.append(RelevanceCheck(layer + 1, tv, vt, should_drop(tv, vt, self.tau)))

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        if not self.checks or self.checks[-1].layer != layer:
            return None
        drop = self.checks[-1].drop.to(hidden.device)
        return KeepDecision(sequence.visual & ~drop[:, None], None, "preserve")


def _ratios(attention: Attention, sequence: SequenceView) -> tuple[Tensor, Tensor]:
    """(α_tv, α_vt) [B] of eq. 8; NaN for samples without later text or without visual tokens.

    Only the rows needed are computed: text after the first visual token; visual rows of second
    and later images, the only ones that can see such text. How many is known on the host.
    """
    visual = sequence.visual
    text = sequence.valid & ~visual & (visual.cumsum(1) > 0)
    several = sequence.segments > 1
    if several:
        real = [n - sum(own) for n, own in zip(sequence.lengths, sequence.counts)]
        rows, row_valid = _rows_of(text, max(real))
    else:
        rows, row_valid = sequence.text_rows()
    alpha_tv = _mass(attention, rows, row_valid, visual) / text.sum(1)
    mass = torch.zeros_like(alpha_tv)
    if several:
        later = max(sum(own[1:]) for own in sequence.counts)
        mass = _mass(attention, *_rows_of(sequence.segment > 0, later), text)
    return alpha_tv, mass / visual.sum(1)


def _rows_of(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Positions of True, (index [B, width], real [B, width]); ``width`` covers every row."""
    order = mask.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :width]
    return order, mask.gather(1, order)


def _mass(attention: Attention, rows: Tensor, real: Tensor, columns: Tensor) -> Tensor:
    """Head-mean weight of some rows on some columns, summed over both: [B] float32."""
    total = torch.zeros(columns.shape[0], device=columns.device)
    one = torch.ones_like(total)
    for part, valid in attention.parts(rows, real):
        total = total + ratio_from_rows(attention.rows(part), valid, columns, count=one)
    return total
