"""A forward without images on a cache that holds compressed layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokprune.engine.cache import CompressedLayer
from tokprune.engine.compat import DynamicCache
from tokprune.engine.layer_calls import LayerCalls


class StepPass:
    """Masks and positions of each layer for the tokens that it really holds."""

    def __init__(
        self, calls: LayerCalls, cache: DynamicCache, attention_mask: Tensor | None
    ) -> None:
        self.calls, self.cache, self.attention_mask = calls, cache, attention_mask
        self._new_valid: tuple[Tensor, bool] | None = None
        #: tokens of the conversation up to the end of this forward, before any compression
        self.total = 0

    def prepare(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        cached = self.cache.layers[number] if len(self.cache.layers) > number else None
        if not isinstance(cached, CompressedLayer):
            return hidden
        batch, q = hidden.shape[:2]
        start = cached.get_seq_length()
        self.total = start + q
        new = self._new(q, hidden.device)
        padded = cached.padded or new is not None

        def valid() -> Tensor | None:
            if not padded:
                return None
            old = cached.all_columns().to(hidden.device) >= 0
            return torch.cat([old, old.new_ones(batch, q) if new is None else new], dim=1)

        position = kwargs["position_ids"]
        if cached.shift is not None:
            position, embeddings = self.calls.embeddings(hidden, position, cached.shift)
            self.calls.place(kwargs, position, embeddings)
        window = None
        if self.calls.window is not None:
            window = cached.window_positions(position.expand(batch, q))
        name = (cached.columns if padded else None, cached if window else None)
        kwargs["attention_mask"] = self.calls.mask(hidden, cached.entries + q, valid, name, window)
        if new is None:
            cached.expect_step()
        else:
            arange = torch.arange(start, start + q, device=hidden.device)
            cached.expect(arange.masked_fill(~new, -1), q, True, cached.shift)
        return hidden

    def _new(self, q: int, device: torch.device) -> Tensor | None:
        """Which of the new tokens are real, [B, q]: a later chat turn of a batch may be padded.
        None: all of them."""
        if q == 1 or self.attention_mask is None:
            return None
        if self._new_valid is None:
            new = self.attention_mask[:, -q:] != 0
            self._new_valid = (new, not bool(new.all()))
        new, padded = self._new_valid
        return new.to(device) if padded else None
