"""Attention of the decoder layer about to run, for methods that rank with it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokprune.engine.cache import brought_back
from tokprune.engine.contracts import Attention, ScoringLayer, SequenceView

if TYPE_CHECKING:
    from tokprune.engine.model import Block
    from tokprune.engine.prefill import PrefillPass

#: what a layer's argument for the KV cache may be called
_CACHE = ("cache", "past_key_values", "past_key_value")


class LayerAhead(ScoringLayer):
    """Runs the layer itself, called with ``args`` and ``kwargs`` by its model, up to its attention:
    so norms, rotation and fused projections are its own."""

    def __init__(
        self, prefill: PrefillPass, number: int, block: Block, args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        self.prefill, self.number, self.block = prefill, number, block
        self.args, self.kwargs = args, kwargs

    def attention(self, hidden: Tensor, sequence: SequenceView) -> Attention:
        prefill = self.prefill
        args, kwargs, _ = prefill.arguments(self.number, self.block, hidden, self.args, self.kwargs)
        held = prefill.cache.layer(self.number)
        call = prefill.ahead(
            self.block, args, {n: None if n in _CACHE else v for n, v in kwargs.items()}
        )
        if prefill.cache.past and getattr(held, "is_initialized", False):
            brought_back(prefill.cache.cache)
            key, value = (x.to(call.key.device) for x in (held.keys, held.values))
            key, value = torch.cat([key, call.key], dim=2), torch.cat([value, call.value], dim=2)
            call = replace(call, key=key, value=value)
        return prefill.attention_of(call, kwargs)

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.prefill.calls.final_norm(hidden)
