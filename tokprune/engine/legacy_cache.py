"""A KV cache of layers, for transformers 4.36 and 4.37, whose own cache is a pair of lists.

The decoder of those releases turns tuples into its cache and back, but hands a ``Cache`` that it
is given on as it is; so one of ours, put in at the prefill, lasts for the whole generation.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokprune.errors import UnsupportedModelError


class GrowingLayer:
    """Keys and values [B, heads, tokens, d] of one decoder layer; the newest token is last."""

    def __init__(self) -> None:
        self.keys: Any = None
        self.values: Any = None
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens; returns all keys and values."""
        if self.is_initialized:
            key_states = torch.cat([self.keys, key_states], dim=-2)
            value_states = torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else 0

    def usable(self) -> int:
        """Entries that the next call of the layer attends to, besides its own tokens."""
        return self.get_seq_length()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            index = beam_idx.to(self.keys.device)
            self.keys, self.values = self.keys[index], self.values[index]

    def crop(self, max_length: int) -> None:
        """Keep the first ``max_length`` tokens."""
        if self.is_initialized:
            self.keys = self.keys[..., :max_length, :]
            self.values = self.values[..., :max_length, :]


class LayeredCache(Cache):
    """What ``past_key_values`` of a patched model is under transformers 4.36 and 4.37."""

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: Any = None
    ) -> tuple[Tensor, Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(GrowingLayer())
        return self.layers[layer_idx].update(key_states, value_states)  # type: ignore[no-any-return]

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Tokens of the original sequence that this cache stands for."""
        at = layer_idx or 0
        return self.layers[at].get_seq_length() if len(self.layers) > at else 0

    def get_usable_length(self, new_seq_length: int, layer_idx: int | None = None) -> int:
        """The decoder asks without a layer and counts in the user's tokens; a layer asks with its
        number, to know how many keys it is going to see."""
        if layer_idx is None:
            return self.get_seq_length()
        return self.layers[layer_idx].usable() if len(self.layers) > layer_idx else 0

    def get_max_length(self) -> None:  # type: ignore[override]
        return None

    @property
    def seen_tokens(self) -> int:
        return self.get_seq_length()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.layers:
            layer.reorder_cache(beam_idx)

    def to_legacy_cache(self) -> NoReturn:
        raise UnsupportedModelError(
            "the cache of a compressed model holds a different number of tokens in every layer, "
            "so contrastive search and assisted generation, which take it apart, do not work; "
            "use greedy search, sampling or beams"
        )

    def __getitem__(self, layer: int) -> NoReturn:
        self.to_legacy_cache()
