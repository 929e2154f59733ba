"""SIEVE inside the decoder: residuals of the visual tokens, and the greedy choice among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import DecoderRun, KeepDecision, ScoringLayer, SequenceView
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
        place_in_order = torch.zeros_like(attention)
        # images of equally many tokens together: prefixes of the choice nest
        alike: dict[int, list[tuple[int, int, int]]] = {}
        for b, (own, now) in enumerate(zip(counts, sequence.counts)):
            for image, (keep, tokens) in enumerate(zip(own, now)):
                if keep < tokens:
                    alike.setdefault(tokens, []).append((b, image, keep))
        for tokens, members in alike.items():
            row, image, _ = torch.tensor(members).T.to(hidden.device, non_blocking=True)
            others = (sequence.segment[row] != image[:, None]).to(torch.int8)
            place, row = others.sort(stable=True).indices[:, :tokens], row[:, None]
            left = text_residual(
                hidden[row, place], text[row[:, 0]], method.energy, method.eps, real[row[:, 0]]
            )
            most = max(keep for _, _, keep in members)
            order = unexplained_and_diverse(
                left.residual, left.ratio, attention[row, place], most
            )  # fmt: skip
            value = torch.arange(most, 0, -1, device=hidden.device, dtype=attention.dtype)
            place_in_order[row, place.gather(1, order)] = value.expand_as(order)
        return KeepDecision.best(place_in_order, counts, sequence, method.new_positions)
