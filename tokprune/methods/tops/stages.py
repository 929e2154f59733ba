"""TOPS's stages: one set at the language-model input, and one at every cut inside the decoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    DecoderRun,
    ImageTokens,
    KeepDecision,
    ScoringLayer,
    SequenceView,
)
from tokprune.methods.decoder_rows import asking_rows, mean_attention, place_in_choice
from tokprune.methods.scoring import PromptSelector, ScorerRun, ScorerStage
from tokprune.operators.sparsevlm import text_raters, text_relevance
from tokprune.operators.tops import Normalise, preservation_set

if TYPE_CHECKING:
    from tokprune.methods.tops import TOPS


@dataclass(frozen=True)
class InputSet(PromptSelector):
    """Stage I of :class:`TOPS`; options as there."""

    name = "tops"

    alpha: float = 0.5
    lam: float = 0.5
    normalise: Normalise = "mean"

    def select(self, image: ImageTokens, keep: int) -> Tensor:
        return next(iter(self.select_alike([image], keep)))

    def select_alike(self, images: Sequence[ImageTokens], keep: int) -> Iterable[Tensor]:
        rows = torch.stack([image.patch_rows() for image in images])
        known = [image.score for image in images if image.score is not None]
        assert len(known) == len(images)
        x = torch.stack([image.features[own] for image, own in zip(images, rows)])
        relevance = torch.stack([score.to(x.device)[own] for score, own in zip(known, rows)])
        order = preservation_set(x, relevance, keep, self.alpha, self.lam, self.normalise)
        return rows.gather(1, order)


class SetStage(ScorerStage):
    """Stage II; where ``raters`` is "sparsevlm" they are chosen on the embedded prompt."""

    method: TOPS

    def __init__(self, method: TOPS) -> None:
        super().__init__(method)
        if method.raters == "sparsevlm":
            self.prune_before |= {0}

    def start(self) -> DecoderRun:
        return _SetRun(self.method)


class _SetRun(ScorerRun):
    method: TOPS

    def __init__(self, method: TOPS) -> None:
        super().__init__(method)
        #: which of the asking rows rate [B, R]; None: all
        self.raters: Tensor | None = None

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        if self.raters is None:
            super().attention(layer, attention, sequence)
        elif self.counts(layer + 1, sequence) != sequence.counts:
            rows, _ = asking_rows(sequence)
            self.score = mean_attention(attention, rows, self.raters.to(rows.device))

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        if layer == 0:
            rows, real = asking_rows(sequence)
            relevance = text_relevance(hidden, sequence.visual, rows, real)
            self.raters = text_raters(relevance, real)
            return None
        counts = self.counts(layer, sequence)
        if counts == sequence.counts:
            return None
        assert self.score is not None
        relevance, method = self.score.to(hidden.device), self.method

        def choose(row: Tensor, place: Tensor, most: int) -> Tensor:
            return preservation_set(
                hidden[row, place], relevance[row, place], most, method.decoder_alpha,
                method.decoder_lam, method.normalise,
            )  # fmt: skip

        score = place_in_choice(sequence, counts, hidden, choose)
        return KeepDecision.best(score, counts, sequence, method.new_positions)
