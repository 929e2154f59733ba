"""What PriorTR does inside the decoder: whom it asks, who cannot be asked, and its threshold."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import Attention, KeepDecision, ScoringLayer, SequenceView
from tokprune.methods.earlier_caches import CacheCuttingRun, CacheCuttingStage
from tokprune.operators.priortr import null_rows

if TYPE_CHECKING:
    from tokprune.methods.priortr import Heads, PriorTR, Queries

#: a null row, and one that may ask
_LEAST_TEXT = 2
#: no more tokens than chat templates have behind an image and no question
_END_OF_TEMPLATE = 8


def question_attention(
    attention: Attention, sequence: SequenceView, queries: Queries, heads: Heads
) -> Tensor:
    """Attention [B, L] of the question, the text after the last image, to every token."""
    rows, real = sequence.text_rows()
    if queries == "last" or not rows.shape[1]:
        return _over_heads(attention.rows(sequence.last_row())[:, :, 0], heads)
    if queries == "but_last":
        # the last row alone where fewer than two others are there
        last = torch.arange(rows.shape[1], device=rows.device) == rows.shape[1] - 1
        enough = torch.tensor([n > _LEAST_TEXT for n in sequence.text_after])
        real = real & (last ^ enough.to(rows.device, non_blocking=True)[:, None])
    total = torch.zeros((), device=rows.device)
    for part, valid in attention.parts(rows, real):
        total = total + (attention.rows(part) * valid[:, None, :, None]).sum(2)
    return _over_heads(total / real.sum(1).clamp(min=1)[:, None, None], heads)


def prior_attention(attention: Attention, sequence: SequenceView, heads: Heads) -> Tensor:
    """Attention [B, L] of each image's null row to its tokens."""
    text = sequence.valid & ~sequence.visual
    rows, _ = null_rows(sequence.segment, text, sequence.segments)
    by_image = attention.rows(rows).transpose(1, 2)
    own = sequence.segment.clamp(min=0)[:, None, :]
    return _over_heads(by_image, heads, dim=2).gather(1, own)[:, 0]


def _over_heads(attention: Tensor, heads: Heads, dim: int = 1) -> Tensor:
    return attention.amax(dim) if heads == "max" else attention.mean(dim)


class PriorTRStage(CacheCuttingStage):
    method: PriorTR

    def start(self) -> PriorTRRun:
        return PriorTRRun(self.method, self.cached)


class PriorTRRun(CacheCuttingRun):
    method: PriorTR

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        _warn(sequence)
        if self.method.score_threshold is None:
            super().attention(layer, attention, sequence)
        elif sequence.segments:
            self.score = self.method.score(attention, sequence)

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        threshold = self.method.score_threshold
        if threshold is None or self.score is None:
            return super().before_layer(layer, hidden, sequence, scoring)
        score, one = self.score, [[min(1, n) for n in row] for row in sequence.counts]
        positions = self.method.new_positions
        asked = torch.tensor([n >= _LEAST_TEXT for n in sequence.text_after]).to(score.device)
        most = KeepDecision.best(score, self.counts(layer, sequence), sequence, positions)
        best = KeepDecision.best(score, one, sequence, positions)
        passed = ((score > threshold) | ~asked[:, None]).to(most.mask.device)
        return replace(most, mask=most.mask & (passed | best.mask), counts=None)

    def counts(self, layer: int, sequence: SequenceView) -> list[list[int]]:
        rows = zip(super().counts(layer, sequence), sequence.counts, sequence.text_after)
        return [own if text >= _LEAST_TEXT else list(now) for own, now, text in rows]


def _warn(sequence: SequenceView) -> None:
    """Say which prompts have no question behind the null row, or perhaps before it."""
    silent, before = [], []
    for b, (counts, text) in enumerate(zip(sequence.counts, sequence.text_after)):
        if any(counts) and text < _LEAST_TEXT:
            silent.append(b)
        elif any(counts) and text <= min(_END_OF_TEMPLATE, _other(sequence, b) - 1):
            before.append(b)
    if silent:
        warnings.warn(
            f"PriorTR: fewer than two tokens of text follow the last image of batch row(s) "
            f"{silent}: nothing asks behind the null row, all tokens are kept there",
            stacklevel=2,
        )
    if before:
        warnings.warn(
            f"PriorTR: at most {_END_OF_TEMPLATE} tokens of text follow the last image of batch "
            f"row(s) {before}, and more stand before it: if the question is among those, the null "
            "row has seen it, and the ranking means little; put the question after the image",
            stacklevel=2,
        )


def _other(sequence: SequenceView, row: int) -> int:
    """Tokens of text before the last image of a row."""
    return sequence.lengths[row] - sum(sequence.counts[row]) - sequence.text_after[row]
