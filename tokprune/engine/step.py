"""A forward without images on a cache that holds compressed layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokprune.engine.cache import CompressedLayer
from tokprune.engine.compat import DynamicCache
from tokprune.engine.contracts import Rectify
from tokprune.engine.layer_calls import LayerCalls, View
from tokprune.engine.model import Block
from tokprune.engine.once import Once
from tokprune.engine.positions import shifted
from tokprune.engine.rectify import Rectifier
from tokprune.engine.static_cache import CompressedStaticLayer


class StepPass:
    """Masks and positions of each layer for the tokens that it really holds."""

    def __init__(
        self, calls: LayerCalls, cache: DynamicCache, rectify: Rectify | None = None
    ) -> None:
        self.calls, self.cache = calls, cache
        self.rectifier = None if rectify is None else Rectifier(rectify, calls)
        #: tokens of the conversation up to the end of this forward, before any compression
        self.total = 0
        self.once = Once()

    def prepare(
        self, number: int, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        layer = self.cache.layers[number] if len(self.cache.layers) > number else None
        if not isinstance(layer, CompressedLayer):
            return args, kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        self.total = layer.seen + hidden.shape[1]
        mask, rectifier = kwargs.get("attention_mask"), self.rectifier
        made = None if rectifier is None else rectifier.table(kwargs, block)
        if mask is not None or layer.padded or isinstance(layer, CompressedStaticLayer):
            view = self._view(layer, hidden)
            kwargs["attention_mask"] = self.calls.mask(mask, view, block, hidden)
        elif self.calls.backend.startswith("flash") and block.window is not None:
            self.calls.mask(None, self._view(layer, hidden), block, hidden)  # refuses gaps
        if layer.shift is not None:
            self._shift(layer.shift, block, hidden, kwargs)
        if rectifier is not None:
            own = self._view(layer, hidden) if rectifier.in_steps(layer) else None
            rectifier.step(layer, own, made, kwargs, hidden)
        layer.expect_step(hidden.shape[1])
        return args, kwargs

    def _view(self, layer: CompressedLayer, hidden: Tensor) -> View:
        batch, q = hidden.shape[:2]
        start, entries = layer.seen, layer.entries

        def make() -> View:
            new = torch.arange(start, start + q, device=hidden.device).expand(batch, q)
            if isinstance(layer, CompressedStaticLayer) and layer.buffer_slots is not None:
                own, held = _less(new, layer.place_shift), layer.buffer_places
                places = None if held is None else (own, held.to(own.device))
                keys = layer.buffer_slots.to(new.device)
                return View(new, keys, start + q, True, places, layer.gaps)
            keys = torch.cat([layer.all_slots().to(hidden.device).expand(batch, -1), new], dim=1)
            places = None
            if layer.places is not None:
                own = _less(new, layer.place_shift)
                places = (own, torch.cat([layer.all_places().to(new.device), own], dim=1))
            return View(new, keys, start + q, layer.padded, places, layer.gaps)

        return self.once("view", make, layer.slots, layer.places, entries, str(hidden.device))  # type: ignore[no-any-return]

    def _shift(self, shift: Tensor, block: Block, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        native = self.once("native", lambda: self.calls.rotary_position(kwargs, hidden))
        moved = self.once("moved", lambda: shifted(native, shift), shift)
        column = self.once(
            "column",
            lambda: torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1),
        )
        self.calls.place(kwargs, block, None, column, moved)


def _less(columns: Tensor, shift: Tensor | None) -> Tensor:
    """Columns [B, n] less ``shift`` [B]."""
    return columns if shift is None else columns - shift.to(columns.device)[:, None]
