"""What a decoder layer is called with: its mask, its positions, their rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.masks import decoder_mask


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, H, L, d] in the half-split convention; cos, sin [B, L, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


class LayerCalls:
    """Masks and positions of one forward, computed once per distinct sequence and reused by all
    layers that see it. Results are kept by the tensors they were made of: these hash by identity,
    and a key keeps its tensors alive."""

    def __init__(
        self, rotary: Any, backend: str, window: int | None, norm: Any, legacy: bool = False
    ) -> None:
        self.rotary, self.backend, self.window = rotary, backend, window
        #: the decoder's final norm
        self.norm = norm
        #: layers of transformers 4.37: masks of full shape, and no rotary embeddings from outside
        self.legacy = legacy
        self._embeddings: dict[tuple[Tensor, Tensor | None], tuple[Tensor, Any]] = {}
        self._masks: dict[tuple[Any, ...], Tensor | None] = {}

    def embeddings(
        self, hidden: Tensor, position: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Shifted positions [B, q] and their rotary embeddings."""
        key = (position, shift)
        if key not in self._embeddings:
            shifted = position
            if shift is not None:
                shifted = position - shift.to(position.device)[:, None]
            shifted = shifted.clamp(min=0).to(hidden.device)
            self._embeddings[key] = shifted, self.rotary(hidden, shifted)
        shifted, pair = self._embeddings[key]
        if pair[0].device != hidden.device:
            pair = tuple(t.to(hidden.device) for t in pair)
        return shifted, pair

    def mask(
        self, hidden: Tensor, keys: int, valid: Callable[[], Tensor | None],
        name: tuple[Any, ...], positions: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:  # fmt: skip
        """The mask of ``keys`` keys; layers that give the same ``name`` (of objects that hash by
        identity) share it, and only the first of them works out which keys are ``valid``."""
        key = (keys, *name)
        if key not in self._masks:
            mask = decoder_mask(
                self.backend, hidden.shape[1], keys, valid(), hidden.dtype, hidden.device,
                positions, self.window,
            )  # fmt: skip
            if self.legacy and mask is not None and mask.dim() == 4:
                mask = mask.expand(hidden.shape[0], -1, -1, -1)
            self._masks[key] = mask
        mask = self._masks[key]
        return mask if mask is None or mask.device == hidden.device else mask.to(hidden.device)

    def place(self, kwargs: dict[str, Any], position: Tensor, embeddings: Any) -> None:
        """Hand positions to a layer's call."""
        kwargs["position_ids"] = position
        if not self.legacy:
            kwargs["position_embeddings"] = embeddings
