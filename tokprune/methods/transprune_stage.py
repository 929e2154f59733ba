"""What TransPrune does inside the decoder: sum transitions, ask the text, drop."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from tokprune.engine.contracts import (
    DecoderRun,
    DecoderStage,
    KeepDecision,
    ScoringLayer,
    SequenceView,
)
from tokprune.methods.schedule import steps_of
from tokprune.operators.transition import instruction_rows, transition_score, transition_weight

if TYPE_CHECKING:
    from tokprune.methods.transprune import TransPrune


class TransPruneStage(DecoderStage):
    def __init__(self, method: TransPrune) -> None:
        self.method, self.positions = method, method.new_positions
        self.prune_before = frozenset(method.steps)
        if method.alpha > 0:
            last = max(method.steps)
            self.transition_layers = frozenset(
                layer for layer in steps_of(method.transition_layers) if layer < last
            )

    @property
    def ahead(self) -> frozenset[int]:
        return frozenset() if self.method.alpha == 1 else self.prune_before

    def start(self) -> DecoderRun:
        return _TransPruneRun(self.method)


class _TransPruneRun(DecoderRun):
    def __init__(self, method: TransPrune) -> None:
        self.method = method
        #: transition weights [B, L] per 0-based layer, tokens alive now
        self.transitions: dict[int, Tensor] = {}
        #: instruction attention and combined score [B, L] of the newest step, before its drop
        self.instruction: Tensor | None = None
        self.score: Tensor | None = None
        self._warned = False

    def transition(
        self, layer: int, module: Literal["attention", "mlp"], before: Tensor, after: Tensor,
        sequence: SequenceView,
    ) -> None:  # fmt: skip
        valid = sequence.valid if sequence.padded else None
        weight = transition_weight(
            before, after, valid, self.method.normalize, self.method.direction
        )
        earlier = self.transitions.get(layer)
        self.transitions[layer] = weight if earlier is None else earlier + weight

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        method = self.method
        step = method.steps.index(layer)
        counts = sequence.counts_after(lambda tokens: method.count(step, tokens))
        ttv = [weight.to(hidden.device) for weight in self.transitions.values()]
        self.instruction = self._instruction(hidden, sequence, scoring)
        if not ttv:  # attention alone ranks; samples without instruction stay as they are
            counts = [
                own if rows else now
                for own, now, rows in zip(counts, sequence.counts, sequence.text_after)
            ]
            if self.instruction is None:
                return None
        self.score = transition_score(
            ttv, self.instruction, method.alpha, sequence.segment, sequence.segments
        )
        return KeepDecision.best(self.score, counts, sequence, method.new_positions)

    def _instruction(
        self, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> Tensor | None:
        """Attention that the text after the last image pays to each image token, [B, L]."""
        if self.method.alpha == 1:
            return None
        if not self._warned and any(
            any(own) and not rows for own, rows in zip(sequence.counts, sequence.text_after)
        ):
            self._warned = True
            warnings.warn(
                "TransPrune: a prompt has no text after its last image, so nothing says what to "
                "look for; its tokens are ranked by transitions alone"
                if self.transitions
                else "TransPrune: a prompt has no text after its last image and no transitions "
                "were accumulated; its tokens are not pruned here",
                stacklevel=2,
            )
        rows, real = sequence.text_rows()
        if not rows.shape[1]:
            return None
        probabilities = scoring.probabilities(hidden, rows, sequence)
        return instruction_rows(probabilities, real, sequence.segment, sequence.segments)

    def dropped(self, layer: int, index: Tensor) -> None:
        # Padding gathers some token's weight; outside the images it counts for nothing.
        self.transitions = {
            number: weight.gather(1, index.to(weight.device))
            for number, weight in self.transitions.items()
        }
