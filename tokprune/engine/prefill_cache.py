"""The KV cache in a prefill: what its layers held before, and what they are to hold after."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.cache import CompressedLayer, compressed_layer
from tokprune.engine.compat import DynamicCache
from tokprune.engine.contracts import CachePolicy, SequenceView


class PrefillCache:
    """The cache of one prefill, or that there is none; ``past`` tokens of earlier turns (in the
    original count) precede the untouched prompt ``native``. ``attention_mask`` [B, past + L] or
    None."""

    def __init__(
        self, cache: DynamicCache | None, past: int, attention_mask: Tensor | None,
        native: SequenceView, window: int | None,
    ) -> None:  # fmt: skip
        self.cache, self.past, self.attention_mask = cache, past, attention_mask
        self.native, self.window = native, window
        #: by the tensors they were made of, so that layers of one sequence share one object
        self._columns: dict[Tensor, Tensor] = {}
        self._shifts: dict[tuple[Tensor, Tensor | None], Tensor] = {}
        self._policy_lengths: dict[int, list[int]] = {}

    def layer(self, number: int) -> Any:
        """A layer of the cache as it is, or None."""
        if self.cache is None or len(self.cache.layers) <= number:
            return None
        return self.cache.layers[number]

    # ------------------------------------------------------------------ before a layer

    def announce(
        self, number: int, sequence: SequenceView
    ) -> tuple[int, Tensor | None, Tensor | None]:
        """Tell a layer which tokens it is to cache.

        Returns:
            its entries of earlier turns; their columns [B, entries], −1 = padding (None: no
            padding); the shift [B] of their positions (None: not shifted).
        """
        if self.cache is None:
            return 0, None, None
        layer = compressed_layer(self.cache, number)
        entries, past_shift, past_columns = layer.entries, layer.shift, None
        if entries and layer.padded:
            past_columns = layer.all_columns()
        elif entries and self.attention_mask is not None and self._past_padded:
            columns = layer.all_columns()
            past_columns = self._without_padding(columns, self.attention_mask[:, : self.past])
            layer.columns, layer.padded = past_columns, True
        layer.expect(
            self._conversation_columns(sequence), self.native.column.shape[1], sequence.padded,
            self._shift(sequence, past_shift),
        )  # fmt: skip
        return entries, past_columns, past_shift

    def window_positions(self, number: int, position: Tensor) -> tuple[Tensor, Tensor] | None:
        """Positions of queries and of all keys where attention slides (call once per layer)."""
        if self.window is None:
            return None
        if self.cache is None:
            return position, position
        return compressed_layer(self.cache, number).window_positions(position)

    def _shift(self, sequence: SequenceView, past_shift: Tensor | None) -> Tensor:
        """[B] original minus layer position of the next token, for layers of this sequence."""
        here = sequence.next_position
        if (here, past_shift) not in self._shifts:
            shift = self.native.next_position.to(here.device) - here
            if past_shift is not None:
                shift = shift + past_shift.to(shift.device)
            self._shifts[here, past_shift] = shift
        return self._shifts[here, past_shift]

    def _conversation_columns(self, sequence: SequenceView) -> Tensor:
        """Columns of a sequence counted from the start of the conversation; one object per
        sequence, so that decode steps recognise layers that hold the same tokens."""
        column = sequence.column
        if not self.past:
            return column
        if column not in self._columns:
            self._columns[column] = torch.where(column < 0, -1, column + self.past)
        return self._columns[column]

    @cached_property
    def _past_padded(self) -> bool:
        """Whether the cached part of the prompt holds padding (read once, later turns only)."""
        assert self.attention_mask is not None
        return not bool((self.attention_mask[:, : self.past] != 0).all())

    @staticmethod
    def _without_padding(columns: Tensor, mask: Tensor) -> Tensor:
        """Columns [B, n] with −1 where the attention mask has no token."""
        return columns.masked_fill(mask.to(columns.device).gather(1, columns) == 0, -1)

    # ------------------------------------------------------------------ inside a layer

    def visible_keys(
        self, number: int, past: int, sequence: SequenceView, position: Tensor
    ) -> tuple[Tensor | None, tuple[Tensor, int] | None]:
        """Of a layer's ``past`` cached keys and those of ``sequence``: which are real, [B, keys]
        (None: all), and their rotary positions with the window's width where attention slides."""
        cached, device, before = self.layer(number), sequence.column.device, None
        if past and isinstance(cached, CompressedLayer):
            before = cached.all_columns()[:, :past] >= 0 if cached.padded else None
        elif past and self.attention_mask is not None:
            before = self.attention_mask[:, :past] != 0
        valid = real_keys(before, past, sequence)
        if self.window is None:
            return valid, None
        old = getattr(cached, "positions", None)
        if old is None:
            old = torch.arange(past, device=device).expand(len(position), past)
        return valid, (torch.cat([old[:, :past].to(device), position], dim=1), self.window)

    # ------------------------------------------------------------------ after the prefill

    def keep(self, policy: CachePolicy, sequences: list[SequenceView]) -> None:
        """Apply the policy of a method that prunes the KV cache."""
        self._policy_lengths = policy.lengths
        for number, index in policy.index.items():
            self._keep_entries(number, index, policy, sequences[number])

    def _keep_entries(
        self, number: int, index: Tensor, policy: CachePolicy, sequence: SequenceView
    ) -> None:
        assert self.cache is not None
        ordinary = not isinstance(self.layer(number), CompressedLayer)
        layer = compressed_layer(self.cache, number)
        assert layer.columns is not None
        # this prefill's entries are the newest; a sliding layer may hold a part of them only
        earlier = layer.entries - sequence.column.shape[1]
        columns = layer.all_columns()
        if ordinary and self.attention_mask is not None:
            layer.columns = self._without_padding(columns, self.attention_mask)
        if self.window is not None and layer.positions is None:
            before, new = columns[:, : max(earlier, 0)], sequence.position[:, max(-earlier, 0) :]
            layer.positions = torch.cat([before, new.to(columns.device)], dim=1)
        index = index.to(columns.device)
        moved = torch.where(index < 0, -1, (index + earlier).clamp(min=-1))
        if earlier > 0:
            first = torch.arange(earlier, device=moved.device).expand(moved.shape[0], earlier)
            moved = torch.cat([first, moved], dim=1)
        lengths = policy.lengths.get(number)
        full = lengths is not None and min(lengths) == index.shape[1] and earlier == 0
        layer.next_position = self.native.next_position.to(index.device)
        layer.keep_entries(moved, policy.continue_positions, padded=not full)

    # ------------------------------------------------------------------ for the trace

    def lengths(self, number: int, sequence: SequenceView) -> list[int]:
        """KV entries per batch row that a layer holds of this prefill, padding left out."""
        if self.cache is None:
            return [0] * len(sequence.lengths)
        return self._policy_lengths.get(number, sequence.lengths)

    def columns(self, number: int) -> Tensor | None:
        """Columns of all that a compressed layer holds (a reference, nothing is read)."""
        return getattr(self.layer(number), "columns", None)

    def next_position(self, number: int, sequence: SequenceView) -> Tensor:
        """[B] rotary position of the next token in a layer."""
        shift = getattr(self.layer(number), "shift", None)
        if shift is None:
            return sequence.next_position
        return self.native.next_position.to(shift.device) - shift

    @property
    def itemsize(self) -> int:
        """Bytes of a cached number, 0 without a cache."""
        keys: Any = getattr(self.layer(0), "keys", None)
        return 0 if keys is None else keys.element_size()


def real_keys(before: Tensor | None, past: int, sequence: SequenceView) -> Tensor | None:
    """Which of ``past`` cached keys and of those of ``sequence`` are real, [B, past + L]; None
    where all are. ``before`` [B, past]: of the cached ones (None: all)."""
    if before is None and not sequence.padded:
        return None
    valid = sequence.valid
    if not past:
        return valid
    before = valid.new_ones(len(valid), past) if before is None else before.to(valid.device)
    return torch.cat([before, valid], dim=1)
