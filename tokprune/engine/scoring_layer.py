"""Attention of the decoder layer about to run, for methods that rank with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokprune.engine.contracts import ScoringLayer, SequenceView, visible_rows
from tokprune.engine.layer_calls import rotate
from tokprune.operators.attention import attention_rows

if TYPE_CHECKING:
    from tokprune.engine.prefill import PrefillPass


class LayerAhead(ScoringLayer):
    """Projects queries and keys of ``layer``, number ``number`` of the decoder."""

    def __init__(self, prefill: PrefillPass, number: int, layer: Any) -> None:
        self.prefill, self.number, self.layer = prefill, number, layer

    def probabilities(self, hidden: Tensor, rows: Tensor, sequence: SequenceView) -> Tensor:
        attn, calls, cache = self.layer.self_attn, self.prefill.calls, self.prefill.cache
        d = attn.head_dim
        cached = cache.layer(self.number)
        position, (cos, sin) = calls.embeddings(
            hidden, sequence.position, getattr(cached, "shift", None)
        )
        x = self.layer.input_layernorm(hidden)
        batch, length = x.shape[:2]
        chosen = x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))
        q = attn.q_proj(chosen).view(batch, rows.shape[1], -1, d).transpose(1, 2)
        k = attn.k_proj(x).view(batch, length, -1, d).transpose(1, 2)
        cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
        pick = rows[:, :, None].expand(-1, -1, d)
        q, k = rotate(q, cos.gather(1, pick), sin.gather(1, pick)), rotate(k, cos, sin)
        past = 0
        if cached is not None and getattr(cached, "is_initialized", False):
            past = cached.keys.shape[-2]
            k = torch.cat([cached.keys, k], dim=2)
        valid, window = cache.visible_keys(self.number, past, sequence, position)
        allowed = visible_rows(rows + past, past + length, valid, window)
        scaling = getattr(attn, "scaling", None)  # modules of transformers 4.37: 1/√d
        return attention_rows(q, k, scaling, allowed)[..., past:]

    def final_norm(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.prefill.calls.norm(hidden)
        return normed
