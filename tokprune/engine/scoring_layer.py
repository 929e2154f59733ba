"""Attention of the decoder layer about to run, for methods that rank with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokprune.engine.cache import brought_back
from tokprune.engine.contracts import Attention, ScoringLayer, SequenceView
from tokprune.engine.thin import OnlyRows

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
        prefill, block = self.prefill, self.block
        args, kwargs, _ = prefill.arguments(self.number, block, hidden, self.args, self.kwargs)
        bare = {name: None if name in _CACHE else value for name, value in kwargs.items()}
        held = prefill.cache.layer(self.number)
        past: tuple[Tensor, Tensor] | None = None
        if prefill.cache.past and getattr(held, "is_initialized", False):
            brought_back(prefill.cache.cache)
            past = held.keys, held.values

        def run(rows: Tensor | None) -> Attention:
            with nullcontext() if rows is None else OnlyRows(block.attention, rows):
                call = prefill.ahead(block, args, bare)
            if past is not None:
                key, value = (x.to(call.key.device) for x in past)
                call = replace(call, key=torch.cat([key, call.key], dim=2))
                if rows is None:
                    call = replace(call, value=torch.cat([value, call.value], dim=2))
            return prefill.attention_of(call, kwargs)

        return _WhenRead(run)

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.prefill.calls.final_norm(hidden)


class _WhenRead(Attention):
    """Attention of a layer that runs when something of it is read: for rows that are asked for
    first, with their queries alone; else, once, with everything."""

    def __init__(self, run: Callable[[Tensor | None], Attention]) -> None:
        self._run = run

    def rows(self, index: Tensor) -> Tensor:
        if "query" in vars(self):
            return super().rows(index)
        return self._run(index).rows(index)

    def __getattr__(self, name: str) -> Any:  # what is not there yet
        if name.startswith("_") or "query" in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        vars(self).update(vars(self._run(None)))
        return getattr(self, name)
