"""What SparseVLM does inside the decoder: choose raters, rank by them, drop, and merge some."""

from __future__ import annotations

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
from tokprune.methods.decoder_rows import asking_rows
from tokprune.operators.sparsevlm import (
    attention_rank,
    best_heads,
    rater_attention,
    recycle_merge,
    rotary_weight,
    text_raters,
    text_relevance,
    vision_scores,
)
from tokprune.operators.topk import rank

if TYPE_CHECKING:
    from tokprune.methods.sparsevlm import SparseVLM


class SparseStage(DecoderStage):
    def __init__(self, method: SparseVLM) -> None:
        self.method, self.positions = method, method.new_positions
        self.taps = frozenset(layer - 1 for layer in method.steps)
        # before layer 0 the raters are chosen
        self.prune_before = frozenset({0, *method.steps})

    ahead = frozenset()

    def start(self) -> DecoderRun:
        return _SparseRun(self.method)


class _SparseRun(DecoderRun):
    def __init__(self, method: SparseVLM) -> None:
        self.method = method
        #: text tokens that rate, [B, R]; their places are those of the text, which never goes
        self.raters: Tensor | None = None
        #: attention from the raters [B, L], and its rank per image [B, S], of the newest layer
        self.score: Tensor | None = None
        self.ranks: Tensor | None = None
        #: tokens that the newest step kept, merged ones not counted, [B, L] before its drop
        self.kept: Tensor | None = None

    def _choose(self, hidden: Tensor, sequence: SequenceView) -> None:
        rows, real = sequence.text_rows()
        raters = text_raters(text_relevance(hidden, sequence.visual, rows, real), real)
        if not min(sequence.text_after):
            raters = torch.cat([raters, ~real.any(1, keepdim=True)], dim=1)
        self.raters = raters

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        assert self.raters is not None
        method, (places, _) = self.method, asking_rows(sequence)
        raters = self.raters = self.raters.to(places.device)
        total, means = None, []
        for part, rate in attention.parts(places, raters):
            rows, weight = attention.rows(part), None
            if method.uses_gravity:
                assert attention.rotary is not None
                cos, sin = (x.expand(len(part), -1, -1) for x in attention.rotary())
                weight = rotary_weight(cos, sin, part, method.gravity_floor)
            own = rater_attention(rows, rate, weight)
            total = own if total is None else total + own
            if method.keep is None:
                means.append(rows.mean(1))
        assert total is not None
        heads = None
        if method.head_count is not None:
            heads = best_heads(total, sequence.visual, method.head_count)
        self.score = vision_scores(total, raters, heads)
        if means:
            mean = torch.cat(means, dim=1)[:, None]
            images = [sequence.segment == image for image in range(sequence.segments)]
            self.ranks = torch.stack([attention_rank(mean, raters, own) for own in images], dim=1)

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        if layer == 0:
            self._choose(hidden, sequence)
        if self.score is None:
            return None
        score = self.score.to(hidden.device)
        plan = self._plan(layer, sequence)
        counts = [[kept + merged for kept, _, merged in row] for row in plan]
        if counts == sequence.counts:
            return None
        kept = [[kept for kept, _, _ in row] for row in plan]
        answer = KeepDecision.best(score, kept, sequence, self.method.new_positions)
        answer.counts, self.kept = counts, answer.mask
        recycled = [
            (b, s, chosen, merged)
            for b, row in enumerate(plan)
            for s, (_, chosen, merged) in enumerate(row)
            if merged
        ]
        if recycled:
            self._recycle(answer, recycled, hidden, sequence, score)
        return answer

    def _plan(self, layer: int, sequence: SequenceView) -> list[list[tuple[int, int, int]]]:
        """(kept, recycled, merged into) of every image."""
        step = self.method.steps.index(layer)
        none = [[0] * len(row) for row in sequence.counts]
        ranks = none if self.ranks is None else self.ranks.tolist()  # adaptive: one host read
        return [
            [self.method.counts(step, *image) for image in zip(*row)]
            for row in zip(sequence.entering, sequence.counts, ranks)
        ]

    def _recycle(
        self, answer: KeepDecision, images: list[tuple[int, int, int, int]], hidden: Tensor,
        sequence: SequenceView, score: Tensor,
    ) -> None:  # fmt: skip
        """Merge dropped tokens; each merged one takes the slot of the centre of its cluster."""
        device, length = hidden.device, sequence.column.shape[1]
        numbers = torch.tensor(images).to(device, non_blocking=True)
        row, segment, chosen, merged = numbers.unbind(1)
        most = max(n for *_, n in images)
        own = sequence.segment[row] == segment[:, None]
        spare = score[row].masked_fill(~own | answer.mask[row], -torch.inf)
        place = rank(spare)[:, : max(n for _, _, n, _ in images)]
        valid = torch.arange(place.shape[1], device=device) < chosen[:, None]
        found = recycle_merge(hidden[row[:, None], place], most, merged, valid)
        centre = place.gather(1, found.centre.clamp(min=0))
        exists = found.centre >= 0

        def put(base: Tensor, at: Tensor, value: Tensor, real: Tensor) -> Tensor:
            """``base`` [B, L, …] with ``value`` at the places ``at`` [N, n] that are ``real``."""
            flat = base.flatten(0, 1)
            flat = torch.cat([flat, torch.zeros_like(flat[:1])])  # the last row takes the others
            flat[(row[:, None] * length + at).masked_fill(~real, len(flat) - 1)] = value
            return flat[:-1].view_as(base)

        arange = torch.arange(length, device=device)
        kept = torch.where(answer.mask | ~sequence.visual, arange, -1)
        holder = centre.gather(1, found.cluster.clamp(min=0))
        answer.group = put(kept, place, holder, valid)
        answer.hidden = put(hidden, centre, found.out, exists)
        answer.mask = put(answer.mask, centre, torch.ones_like(exists), exists)
        if self.method.order == "published":
            end = torch.where(own, arange, -1).amax(1, keepdim=True)
            behind = end * (most + 1) + 1 + torch.arange(most, device=device)
            spaced = (arange * (most + 1)).expand(sequence.column.shape)
            answer.order = put(spaced, centre, behind, exists)
