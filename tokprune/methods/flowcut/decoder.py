"""FlowCut inside the decoder: the last prompt token ranks the visual tokens of each image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.engine.contracts import Attention, SequenceView
from tokprune.methods.scoring import DecoderScorer
from tokprune.operators.flow import Semantic, ValueNorm, flow_score, text_terms


@dataclass(frozen=True)
class DecoderCut(DecoderScorer):
    """The cut of :class:`FlowCut` inside the decoder; options as there."""

    name = "flowcut"

    semantic: Semantic = "dot"
    value_norm: ValueNorm = "mean"

    def score(self, attention: Attention, sequence: SequenceView) -> Tensor:
        past = attention.past
        key, value = attention.key[:, :, past:], attention.value[:, :, past:]
        last = sequence.last_row()
        q_row, v_row = _row(attention.query, last), _row(value, last)
        total = torch.zeros(sequence.column.shape, device=key.device)
        for image in range(sequence.segments):
            own = sequence.segment == image
            terms = text_terms(
                q_row, key, v_row, value, attention.scaling, self.semantic, self.value_norm, own
            )
            total = total + flow_score(*terms)
        return total


def _row(x: Tensor, index: Tensor) -> Tensor:
    """Row ``index`` [B, 1] of [B, H, L, d], as [B, H, 1, d]."""
    batch, heads, _, width = x.shape
    return x.gather(2, index[:, None, :, None].expand(batch, heads, 1, width))
