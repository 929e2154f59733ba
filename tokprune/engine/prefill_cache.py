"""The KV cache in a prefill: what its layers held before, and what they are to hold after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokprune.engine.cache import CompressedLayer, Newest, brought_back, compressed_layer
from tokprune.engine.compat import LEGACY, DynamicCache
from tokprune.engine.contracts import CachePolicy, SequenceView
from tokprune.engine.layer_calls import View
from tokprune.engine.once import Once
from tokprune.engine.rectify import Keys
from tokprune.engine.static_cache import CompressedStaticLayer


class PrefillCache:
    """The cache of one prefill, or that there is none; ``past`` tokens of earlier turns (in the
    original count) precede the untouched prompt ``native``. ``attention_mask`` [B, past + L] or
    None. ``source`` [B, L] (CPU): column of the user's prompt that each of a wider one comes from
    (:mod:`tokprune.engine.widen`); None: it is the user's.
    ``text_behind``: text at the end of all rows; ``guesses``: tokens there that may be taken back.
    """

    def __init__(
        self, past: int, attention_mask: Tensor | None, native: SequenceView,
        source: Tensor | None = None, text_behind: int = 0, guesses: int = 0,
    ) -> None:  # fmt: skip
        self.source, self.text_behind, self.guesses = source, text_behind, guesses
        #: filled in where the first layer is handed one
        self.cache: DynamicCache | None = None
        self.past, self.attention_mask, self.native = past, attention_mask, native
        self.once = Once()
        self._policy_lengths: dict[int, list[int]] = {}

    def layer(self, number: int) -> Any:
        """A layer of the cache as it is, or None."""
        if self.cache is None or len(self.cache.layers) <= number:
            return None
        return self.cache.layers[number]

    # ------------------------------------------------------------------ before a layer

    def view(self, number: int, sequence: SequenceView) -> tuple[View, Tensor | None]:
        """What a layer's queries and keys are, if it runs on ``sequence``, and the shift [B] of its
        earlier turns."""
        layer = None if self.cache is None else self.layer(number)
        held = layer if self.past and layer is not None else None
        slots = places = shift = behind = None
        padded = gaps = False
        if isinstance(held, CompressedLayer):
            slots, places, padded, gaps = held.slots, held.places, held.padded, held.gaps
            shift, behind = held.shift, held.place_shift
        entries = 0 if held is None else _entries(held)

        def make() -> View:
            queries = self._in_conversation(sequence.slot)
            keys = queries
            if entries:
                before = _all_slots(held)
                before = before.to(queries.device).expand(len(queries), -1)
                keys = torch.cat([before, queries], dim=1)
            own = None
            if sequence.place is not None or places is not None:
                new = sequence.slot if sequence.place is None else sequence.place
                new = new + self.past
                if behind is not None:
                    new = new - behind.to(new.device)[:, None]
                before = keys[:, :entries]
                if isinstance(held, CompressedLayer):
                    before = held.all_places().to(new.device)
                own = (new, torch.cat([before, new], dim=1))
            total = self.past + self.native.column.shape[1]
            padding, hole = padded or sequence.padded, gaps or sequence.gaps
            return View(queries, keys, total, padding, own, hole)

        return self.once("view", make, sequence, slots, places, entries), shift

    def announce(
        self, number: int, sequence: SequenceView, view: View, window: int | None = None,
        keys: Keys | None = None,
    ) -> None:  # fmt: skip
        """Tell a layer, whose attention sees ``window`` tokens (None: all), what it is to cache;
        ``keys``: what rectified attention is to know of it."""
        if self.cache is None:
            return
        layer = compressed_layer(self.cache, number)
        mask = self.attention_mask
        if layer.entries and mask is not None and not layer.padded and layer.columns is not None:
            # earlier turns that were not compressed: padding is no entry
            early = mask[:, : self.past].to(layer.columns.device)
            columns = layer.all_columns().expand(len(early), -1)
            layer.columns = layer.slots = columns.masked_fill(early.gather(1, columns) == 0, -1)
        column = self._in_conversation(self.users(sequence.column))
        # in a wider prompt, slots are no columns of the user's: later tokens see all that is there
        moved = sequence.slot is not sequence.column and self.source is None
        newest = None
        if window is not None and not LEGACY:  # caches of transformers 4.37 hold everything
            # the next token sees one less beside itself; before it, guesses may go again
            newest = Newest(max(1, window - 1) + self.guesses, self.guesses, self.once)
        layer.expect(column, view.queries if moved else column, self.original, newest)
        layer.shift = self._shift(sequence.shift, layer.shift)
        layer.place_shift = self._shift(sequence.place_shift, layer.place_shift)
        layer.places = None if view.places is None else view.places[1]
        layer.padded, layer.gaps = view.padded, view.gaps
        if keys is not None:
            keys.tell(layer)

    @property
    def original(self) -> int:
        """Tokens of the user's prompt."""
        length = self.native.column.shape[1]
        return length if self.source is None else int(self.source.max()) + 1

    def users(self, column: Tensor) -> Tensor:
        """Columns [B, n] of the prompt as columns of the user's."""
        if self.source is None:
            return column
        source = self.source.to(column.device, non_blocking=True)
        return self.once(  # type: ignore[no-any-return]
            "users", lambda: source.gather(1, column.clamp(min=0)).masked_fill(column < 0, -1),
            column,
        )  # fmt: skip

    def _shift(self, new: Tensor | None, past: Tensor | None) -> Tensor | None:
        if new is None or past is None:
            return past if new is None else new
        return self.once("shift", lambda: new + past.to(new.device), new, past)  # type: ignore[no-any-return]

    def _in_conversation(self, column: Tensor) -> Tensor:
        """Columns counted from the start of the conversation; one object per sequence, so that
        decode steps recognise layers that hold the same tokens."""
        if not self.past:
            return column
        return self.once(  # type: ignore[no-any-return]
            "column", lambda: torch.where(column < 0, -1, column + self.past), column
        )

    # ------------------------------------------------------------------ after the prefill

    def mark_ends(self) -> None:
        """Tell the layers how much text ended the prompt: here and not in :meth:`announce`, where
        ``torch.compile`` would make another graph for every number."""
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                held = layer.croppable
                layer.behind = self.text_behind if held is None else min(held, self.text_behind)

    def keep(self, policy: CachePolicy, sequences: list[SequenceView]) -> None:
        """Apply the policy of a method that prunes the KV cache."""
        self._policy_lengths = policy.lengths
        brought_back(self.cache)
        for number, index in policy.index.items():
            self._keep_entries(number, index, policy, sequences[number])

    def _keep_entries(
        self, number: int, index: Tensor, policy: CachePolicy, sequence: SequenceView
    ) -> None:
        assert self.cache is not None
        ordinary = not isinstance(self.layer(number), CompressedLayer)
        layer = compressed_layer(self.cache, number)
        if isinstance(layer, CompressedStaticLayer):
            layer.slide()
        # this prefill's entries are the newest; a sliding layer may hold a part of them only
        earlier = layer.entries - sequence.column.shape[1]
        columns = layer.all_columns()
        if ordinary and self.attention_mask is not None:
            real = self.attention_mask.to(columns.device).gather(1, columns) != 0
            layer.columns = layer.slots = columns.masked_fill(~real, -1)
        index = index.to(columns.device)
        moved = torch.where(index < 0, -1, (index + earlier).clamp(min=-1))
        if earlier < 0:  # no more than it holds can be kept
            moved = moved[:, -layer.entries :]
        if earlier > 0:
            first = torch.arange(earlier, device=moved.device).expand(moved.shape[0], earlier)
            moved = torch.cat([first, moved], dim=1)
        lengths = policy.lengths.get(number)
        full = lengths is not None and min(lengths) == index.shape[1] and earlier == 0
        following = None if policy.continue_positions else self.native_next - self._first_position
        layer.keep_entries(moved, following, padded=not full)

    # ------------------------------------------------------------------ for the trace

    @property
    def native_next(self) -> Tensor:
        """[B] rotary position of the token after the untouched prompt."""
        native = self.native
        position = native.position.masked_fill(~native.valid.to(native.position.device), -1)
        return position.amax(-1).reshape(-1, len(native.lengths)).amax(0) + 1

    @property
    def _first_position(self) -> Tensor:
        """[B] position of the first token of the conversation: what the family counts from."""
        native = self.native
        far = torch.iinfo(native.position.dtype).max
        valid = native.valid.to(native.position.device)
        first = native.position.masked_fill(~valid, far).amin(-1)
        if not self.past:
            return first
        mask = self.attention_mask
        earlier = self.past if mask is None else (mask[:, : self.past] != 0).sum(1).to(first.device)
        return first - earlier

    def lengths(self, number: int, sequence: SequenceView) -> list[int]:
        """KV entries per batch row that a layer holds of this prefill, padding left out."""
        if self.cache is None:
            return [0] * len(sequence.lengths)
        return self._policy_lengths.get(number, sequence.lengths)

    def columns(self, number: int) -> Tensor | None:
        """Columns of all that a compressed layer holds (a reference, nothing is read)."""
        return getattr(self.layer(number), "columns", None)

    def next_position(self, number: int, sequence: SequenceView, following: Tensor) -> Tensor:
        """[B] rotary position of the next token in a layer; ``following``: in the untouched
        prompt."""
        shift = getattr(self.layer(number), "shift", None)
        shift = sequence.shift if shift is None else shift
        return following if shift is None else following.to(shift.device) - shift

    @property
    def itemsize(self) -> int:
        """Bytes of a cached number, 0 without a cache."""
        held = (getattr(self.layer(n), "keys", None) for n in range(len(self.layers)))
        keys: Any = next((x for x in held if x is not None), None)
        return 0 if keys is None else keys.element_size()

    @property
    def layers(self) -> Any:
        return () if self.cache is None else self.cache.layers


def _entries(layer: Any) -> int:
    """Entries that an ordinary or a compressed layer really holds."""
    if isinstance(layer, CompressedLayer):
        return layer.entries
    keys = getattr(layer, "keys", None)
    return 0 if keys is None or not layer.is_initialized else int(keys.shape[-2])


def _all_slots(layer: Any) -> Tensor:
    """Columns [B or 1, entries] in masks of what a layer holds: of an ordinary one the newest that
    it has seen."""
    if isinstance(layer, CompressedLayer):
        return layer.all_slots()
    length = layer.get_seq_length()
    return torch.arange(length - _entries(layer), length, device=layer.keys.device)[None]
