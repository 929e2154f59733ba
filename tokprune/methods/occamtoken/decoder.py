"""Stage 2 of OccamToken: what the question attends to, measured by the registers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

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
from tokprune.methods.base import resolve_keep
from tokprune.operators.occamtoken import stage2

if TYPE_CHECKING:
    from tokprune.methods.occamtoken import OccamToken


class QuestionStage(DecoderStage):
    positions = "preserve"
    ahead = frozenset()

    def __init__(self, method: OccamToken) -> None:
        self.method = method
        self.prune_before = frozenset({method.prune_before})
        self.taps = frozenset({method.prune_before - 1})

    def start(self) -> DecoderRun:
        return _QuestionRun(self.method)


class _QuestionRun(DecoderRun):
    def __init__(self, method: OccamToken) -> None:
        self.method = method
        #: what stays; None: all
        self.decision: KeepDecision | None = None

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        asks = any(text and any(own) for text, own in zip(sequence.text_after, sequence.counts))
        if sequence.tag is None or not asks:
            return  # no register is there, or nobody to ask
        method = self.method
        highest, mean = _of_question(attention, sequence)
        # rows without a question keep what they have
        if method.keep is not None:
            self.decision = self._best(highest.masked_fill(sequence.tag, torch.inf), sequence)
            return
        found = stage2(
            highest, mean, sequence.segment, sequence.tag, method.lambda2, method.min_keep
        )
        keep = found.keep | (sequence.visual & ~sequence.after.any(1, keepdim=True))
        self.decision = KeepDecision(keep, None, "preserve")

    def _best(self, score: Tensor, sequence: SequenceView) -> KeepDecision:
        """As many of every image as ``keep`` says."""
        keep = self.method.keep
        assert keep is not None
        counts = [
            own if text else now
            for own, now, text in zip(
                sequence.counts_after(lambda tokens: resolve_keep(keep, tokens)),
                sequence.counts, sequence.text_after,
            )
        ]  # fmt: skip
        return KeepDecision.best(score, counts, sequence, "preserve")

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        found = self.decision
        return None if found is None else replace(found, mask=found.mask.to(hidden.device))


def _of_question(attention: Attention, sequence: SequenceView) -> tuple[Tensor, Tensor]:
    """Head mean of the attention that each token gets from the text behind the last image: the
    largest and the mean over its rows, [B, L] float32 each."""
    rows, real = sequence.text_rows()
    highest = torch.zeros(sequence.segment.shape, device=rows.device)
    total = highest
    for part, valid in attention.parts(rows, real):
        own = attention.rows(part).mean(1).masked_fill(~valid[:, :, None], 0.0)
        highest, total = highest.maximum(own.amax(1)), total + own.sum(1)
    return highest, total / real.sum(1, keepdim=True).clamp(min=1)
