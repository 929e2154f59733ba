"""SIEVE inside the decoder: residuals of the visual tokens, and the greedy choice among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tokprune.engine.contracts import DecoderRun, KeepDecision, ScoringLayer, SequenceView
from tokprune.methods.decoder_rows import place_in_choice
from tokprune.methods.scoring import ScorerRun, ScorerStage
from tokprune.operators.sieve import text_residual, unexplained_and_diverse

if TYPE_CHECKING:
    from tokprune.methods.sieve import SIEVE


class ResidualStage(ScorerStage):
    method: SIEVE

    def start(self) -> DecoderRun:
        return _ResidualRun(self.method)


class _ResidualRun(ScorerRun):
    """``score`` holds the attention of the text, [B, L]."""

    method: SIEVE

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        counts, method = self.counts(layer, sequence), self.method
        if counts == sequence.counts:
            return None
        assert self.score is not None
        attention = self.score.to(hidden.device)
        rows, real = method.text(sequence)
        text = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[2]))

        def choose(row: Tensor, place: Tensor, most: int) -> Tensor:
            own = row[:, 0]
            left = text_residual(
                hidden[row, place], text[own], method.energy, method.eps, real[own]
            )  # fmt: skip
            score = attention[row, place]
            return unexplained_and_diverse(left.residual, left.ratio, score, most)

        score = place_in_choice(sequence, counts, hidden, choose)
        return KeepDecision.best(score, counts, sequence, method.new_positions)
