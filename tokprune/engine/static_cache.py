"""Static caches: buffers whose shape stays the same for a whole generation, so that its steps can
be compiled.

In a prefill with images a layer is an ordinary compressed one, which grows. Once the prompt has
gone through, what is left of it moves to the start of a buffer, and behind it is room for as many
new tokens as the user's cache has. The mask of a step is the model's own at the columns that the
places of the buffer stand for; those of tokens to come are hidden in it anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokprune.engine.cache import CompressedLayer
from tokprune.engine.compat import LEGACY, StaticCache, StaticLayer, StaticSlidingWindowLayer
from tokprune.errors import UnsupportedModelError


class CompressedStaticLayer(CompressedLayer):
    """A layer of a static cache, from its first prompt with images to its next ``reset``, which
    makes it an ordinary one again.

    ``room``: tokens of a conversation, before any compression, that the user's cache is for.
    ``window``: tokens that it would hold at most (None: all).
    ``filled``: entries in the buffer, on the device; None while a prompt goes through.
    ``buffer_slots``, ``buffer_places``, ``buffer_log_sizes`` [B, room − missing]: as ``slots``,
    ``places`` and ``log_sizes``, of every place of the buffer.
    """

    _per_row = (*CompressedLayer._per_row, "buffer_slots", "buffer_places", "buffer_log_sizes")

    room: int
    window: int | None
    #: the kind of layer that this was, and what it held besides keys and values
    _plain: tuple[Any, dict[str, Any]]

    def _forget(self) -> None:
        super()._forget()
        self.filled: Tensor | None = None
        self.buffer_slots: Tensor | None = None
        self.buffer_places: Tensor | None = None
        self.buffer_log_sizes: Tensor | None = None
        #: as ``filled``, −1 = not known on the host
        self._entries = 0
        #: layers of a cache that share a shift have one number
        self.shift_number = 0

    @classmethod
    def take_over(cls, layer: Any, room: int, window: int | None) -> None:
        """Make an ordinary layer a compressed one, with what it holds."""
        seen = int(layer.get_seq_length()) if layer.is_initialized else 0
        held = min(seen, layer.max_cache_len)
        own = layer.__dict__
        plain = {n: value for n, value in own.items() if n not in ("keys", "values")}
        keys, values = own["keys"], own["values"]
        layer.__class__, layer._plain = cls, (type(layer), plain)
        layer.keys = layer.values = None
        layer.is_initialized = False
        layer._forget()
        layer.room, layer.window = room, window if layer._plain[0].is_sliding else None
        if held:
            layer._hold(keys[:, :, :held], values[:, :, :held], seen)

    def reset(self) -> None:
        kind, plain = self._plain
        if self.keys is not None:  # read by transformers 4, whose caches last from call to call
            plain.setdefault("max_batch_size", self.keys.shape[0])
        own: Any = self
        own.__dict__.clear()
        own.__dict__.update(plain, keys=None, values=None, is_initialized=False)
        own.__class__ = kind
        own.reset()

    # ------------------------------------------------------------------ a prompt, then steps

    def thaw(self) -> None:
        """Before a prompt: grow again."""
        if self.filled is not None:
            entries = self.entries
            self.keys, self.values = self.keys[:, :, :entries], self.values[:, :, :entries]
            self.filled = self.buffer_slots = self.buffer_places = self.buffer_log_sizes = None

    def slide(self) -> None:
        """Forget what a layer that grows has forgotten by itself: tokens out of its window."""
        if self.window is not None and not self.missing and self.entries >= self.window:
            newest = torch.arange(self.entries - self.window + 1, self.entries, device=self.device)
            self.keep_entries(newest.expand(self.keys.shape[0], -1), None, self.padded)

    def freeze(self) -> None:
        """After a prompt: from here on steps only."""
        if self.filled is not None or self.keys is None:
            return
        entries = self._entries = super().entries
        with torch.no_grad():
            self.keys, self.values = self._buffer(self.keys), self._buffer(self.values)
        self.filled = torch.full((), entries, dtype=torch.long, device=self.device)
        for held in (self.keys, self.values, self.filled):
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(held)
        self._place_buffer()

    def _buffer(self, held: Tensor) -> Tensor:
        batch, heads, entries, width = held.shape
        made = held.new_zeros(batch, heads, self.room - self.missing, width)
        made[:, :, :entries] = held
        return made

    def _place_buffer(self) -> None:
        assert self.columns is not None
        later = torch.arange(self.columns.shape[1] + self.missing, self.room, device=self.device)
        self.buffer_slots = self._with_later(self.slots, later)
        if self.places is not None:
            self.buffer_places = self._with_later(self.places, later, self.place_shift)
        if self.log_sizes is not None:
            more = self.buffer_slots.shape[1] - self.log_sizes.shape[1]
            self.buffer_log_sizes = pad(self.log_sizes, (0, more))

    def log_sizes_behind(self, tokens: int) -> Tensor:
        if self.buffer_log_sizes is None:
            return super().log_sizes_behind(tokens)
        return self.buffer_log_sizes

    @property
    def entries(self) -> int:
        if self.filled is None:
            return super().entries
        if self._entries < 0:
            self._entries = int(self.filled)
        return self._entries

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        return self.seen if self.filled is None else self.filled + self.missing

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_mask_sizes(*args, **kwargs) if self.filled is None else (self.room, 0)

    def get_max_length(self) -> int:
        return self.room

    get_max_cache_shape = get_max_length

    @property
    def max_batch_size(self) -> int:
        return 0 if self.keys is None else int(self.keys.shape[0])

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return self.filled is not None

    def expect_step(self, tokens: int) -> None:
        super().expect_step(tokens)
        if self.filled is not None:
            self._entries = self.entries + tokens

    def expect_traced_step(self) -> None:
        """:meth:`expect_step` without a number on the host, which would change in every step."""
        self._step, self._entries = True, -1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.filled is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self._check_announced()
        self._step = False
        tokens = key_states.shape[-2]
        place = torch.arange(tokens, device=key_states.device) + self.filled
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        self.filled.add_(tokens)
        return self.keys, self.values

    def _take_off(self, tokens: int) -> None:
        if self.filled is None:
            return super()._take_off(tokens)
        self._entries = self.entries - tokens
        self.filled.sub_(tokens)
        self._place_buffer()
        return None


# ---------------------------------------------------------------------- whole caches


def is_static(cache: Any) -> bool:
    """Whether a cache has buffers of a fixed shape."""
    return not LEGACY and type(cache) is StaticCache


def take_over(cache: Any, windows: Sequence[int | None], tokens: int) -> None:
    """Before a prompt that ends at ``tokens`` of the conversation, on a model whose layers have
    these sliding ``windows``: make all layers of a static cache such as shorten and grow.

    Raises:
        UnsupportedModelError: what the layers hold cannot be shortened, or they do not tell how
            many tokens they are for.
        ValueError: too few.
    """
    ordinary = (StaticLayer, StaticSlidingWindowLayer)
    for layer in cache.layers:
        if isinstance(layer, StaticLayer) and type(layer) not in ordinary:
            raise UnsupportedModelError(
                f"past_key_values=StaticCache with layers of {type(layer).__name__} is not "
                "supported with visual-token compression; use transformers.DynamicCache (the "
                "default)"
            )
    room = _room(cache, windows)
    if room < tokens:
        raise ValueError(
            f"past_key_values=StaticCache(max_cache_len={room}) is too short; it should be at "
            f"least {tokens}, the length of the prompt before compression"
        )
    for layer, window in zip(cache.layers, windows):
        if isinstance(layer, CompressedStaticLayer):
            layer.thaw()
        elif isinstance(layer, StaticLayer):
            CompressedStaticLayer.take_over(layer, room, window)


def freeze(cache: Any) -> None:
    """After a prompt: layers of a static cache keep their shape."""
    shifts: dict[int, int] = {}
    for layer in cache.layers:
        if isinstance(layer, CompressedStaticLayer):
            layer.freeze()
            layer.shift_number = shifts.setdefault(id(layer.shift), len(shifts))


def padding_in(mask: Any, tokens: int) -> Any:
    """The real ones [B, tokens] of a conversation's tokens, by a mask that ``generate`` made ahead
    of a forward on a static cache: [B, 1, q, n], or a dict of these by kind of layer. Other masks
    are given back."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return mask
    last = mask[:, 0, -1, :tokens]  # the last token sees all before it
    return (last if last.dtype == torch.bool else last == 0).long()


def _room(cache: Any, windows: Sequence[int | None]) -> int:
    """The tokens of a conversation that a static cache is for. Layers with a window shorter than
    that do not tell."""
    rooms = []
    for layer, window in zip(cache.layers, windows):
        if isinstance(layer, CompressedStaticLayer):
            rooms.append(layer.room)
        elif not isinstance(layer, StaticLayer):
            continue
        elif window is None or not layer.is_sliding or layer.max_cache_len < window:
            rooms.append(layer.max_cache_len)
    if not rooms:
        raise UnsupportedModelError(
            "past_key_values=StaticCache of a model all of whose layers have sliding windows does "
            "not tell how many tokens it is for; use transformers.DynamicCache (the default), or "
            "a max_cache_len below the window"
        )
    return max(rooms)
