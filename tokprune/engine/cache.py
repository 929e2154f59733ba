"""A KV-cache layer that holds fewer tokens than the sequence it stands for.

To transformers it reports the length of the *original* sequence, so that masks, positions and
the slicing of prompts in ``generate`` keep counting in the user's tokens; the engine knows which
of them are really there. All state of a generation lives here, so two generations, a second
chat turn, beams and copies of a cache cannot mix.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokprune.engine.compat import LEGACY, DynamicCache, DynamicLayer, StaticCache
from tokprune.errors import UnsupportedModelError


@dataclass(frozen=True)
class Newest:
    """What a layer with a sliding window holds after a prompt: its newest ``entries``, the last
    ``croppable`` of which may be taken off again. ``once(make, *sources)``: layers that hold the
    same share it."""

    entries: int
    croppable: int
    once: Callable[..., Any]

    def of(self, columns: Tensor) -> Tensor:
        """What ``columns`` [.., n] says of all tokens, of them alone: [.., entries]."""
        made: Tensor = self.once(
            "newest", lambda: columns[..., -self.entries :], columns, self.entries
        )
        return made


class CompressedLayer(DynamicLayer):
    """Cache of one decoder layer after tokens were dropped.

    ``columns`` [B, n]: original column of the entries cached by compressed prefills, −1 =
    padding; entries after them are later tokens. ``slots`` [B, n]: the columns that they take in
    masks (:class:`~tokprune.engine.contracts.SequenceView`). ``shift`` [B]: what to subtract from
    a token's original position to get its position in this layer. ``places`` [B, n] and
    ``place_shift`` [B]: the same for where sliding windows count the tokens (None: at their
    slots). ``padded``, ``gaps``: whether ``columns`` holds −1, and positions gaps (known on the
    host). Where attention is rectified: ``log_sizes`` [B, n], log of how many tokens each entry
    stands for (None: 1 each); ``rotary`` [B, axes, n], their rotary positions, ``rotary_shift``
    [B], by how much those of later entries are below their columns, and ``rectified`` [B] bool,
    the rows whose attention also gets a term of distances.
    """

    keys: Any
    values: Any
    dtype: Any  # of layers before transformers 5.24
    #: what has a row for each of the batch, besides keys and values
    _per_row: tuple[str, ...] = (
        "columns", "slots", "places", "log_sizes", "rotary", "shift", "place_shift", "rotary_shift",
        "rectified",
    )  # fmt: skip
    #: what of it has an entry in its last dimension for each of the prefills'
    _per_entry: tuple[str, ...] = ("columns", "slots", "places", "log_sizes", "rotary")

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.columns: Tensor | None = None
        self.slots: Tensor | None = None
        self.shift: Tensor | None = None
        self.places: Tensor | None = None
        self.place_shift: Tensor | None = None
        self.log_sizes: Tensor | None = None
        self.rotary: Tensor | None = None
        self.rotary_shift: Tensor | None = None
        self.rectified: Tensor | None = None
        self.padded = self.gaps = False
        #: newest entries of the prefill that are the newest tokens of all rows
        self.behind = 0
        #: how many of these it still holds where earlier tokens have left it; None: all
        self.croppable: int | None = None
        #: original tokens beyond the entries that are really cached
        self.missing = 0
        self._pending: tuple[Tensor, Tensor, int, Newest | None] | None = None
        self._step = False

    @classmethod
    def wrap(cls, layer: DynamicLayer | None) -> CompressedLayer:
        """A compressed layer with the content of an ordinary one."""
        new = cls()
        if layer is not None and layer.is_initialized and layer.keys is not None:
            # an offloaded layer keeps its keys elsewhere meanwhile
            new.device = getattr(layer, "device", layer.keys.device)
            # a sliding layer has seen more than it holds
            new._hold(layer.keys, layer.values, layer.get_seq_length())
        return new

    def _hold(self, keys: Any, values: Any, seen: int) -> None:
        """Start with the newest of ``seen`` tokens."""
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype = keys.dtype
        if not hasattr(self, "device"):
            self.device = keys.device
        batch, held = keys.shape[0], keys.shape[-2]
        if held:
            arange = torch.arange(seen - held, seen, device=self.device)
            self.columns = self.slots = arange.expand(batch, held)
            self.missing = seen - held

    @property
    def entries(self) -> int:
        """Entries really cached."""
        return super().get_seq_length()

    @property
    def seen(self) -> int:
        """Length of the original sequence that this cache stands for."""
        return self.entries + self.missing

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.seen

    def expect(
        self, columns: Tensor, slots: Tensor, original: int, newest: Newest | None = None
    ) -> None:
        """Announce a compressed prefill: original ``columns`` and ``slots`` [B, L'] of the
        ``original`` tokens whose keys the next ``update`` brings; ``newest``: what is held of them
        afterwards (None: all)."""
        self._pending = (columns, slots, original, newest)

    def expect_step(self, tokens: int) -> None:
        """Announce ordinary ``tokens``, none dropped."""
        self._step = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        newest = None
        if self._pending is not None:
            columns, slots, original, newest = self._pending
            self._pending = self.croppable = None
            moved = slots is not columns or self.slots is not self.columns
            if self.columns is not None:
                if moved:
                    slots = torch.cat([self.all_slots(), slots], dim=1)
                columns = torch.cat([self.all_columns(), columns], dim=1)
            self.columns, self.slots = columns, slots if moved else columns
            self.missing += original - key_states.shape[-2]
        else:
            self._check_announced()
            self._step = False
        held = super().update(key_states, value_states, *args, **kwargs)
        if newest is not None and self.entries > newest.entries:
            self._keep_newest(newest)
        return held

    def _keep_newest(self, newest: Newest) -> None:
        """Forget what no later token sees, as a layer of a model that is not patched does."""
        self.missing += self.entries - newest.entries
        # copies: a view would hold on to all of them
        self.keys = self.keys[..., -newest.entries :, :].clone()
        self.values = self.values[..., -newest.entries :, :].clone()
        together = self.slots is self.columns
        for name in self._per_entry:
            if (value := getattr(self, name)) is not None:
                setattr(self, name, newest.of(value))
        if together:
            self.slots = self.columns
        self.croppable = newest.croppable

    def _check_announced(self) -> None:
        if self._pending is None and not self._step:
            raise RuntimeError(
                "past_key_values was compressed by tokprune, but the model that continues on it "
                "is not patched; patch it with the same method, or start with a new cache"
            )

    def usable(self) -> int:
        """Entries that the next call of the layer attends to (asked by transformers 4.37 only)."""
        self._check_announced()
        return self.entries

    def all_columns(self) -> Tensor:
        """Original columns of every cached entry, [B, entries]."""
        return self._with_later(self.columns, self._later(self.columns))

    def all_slots(self) -> Tensor:
        """The columns that every cached entry takes in masks, [B, entries]."""
        return self._with_later(self.slots, self._later(self.slots))

    def all_places(self) -> Tensor:
        """Where sliding windows count every cached entry, [B, entries]."""
        if self.places is None:
            return self.all_slots()
        return self._with_later(self.places, self._later(self.places), self.place_shift)

    def all_log_sizes(self) -> Tensor | None:
        """Log of how many tokens every cached entry stands for, [B, entries]; None: 1 each."""
        return None if self.log_sizes is None else self.log_sizes_behind(0)

    def log_sizes_behind(self, tokens: int) -> Tensor:
        """The same with those of so many more tokens behind them."""
        assert self.log_sizes is not None
        return pad(self.log_sizes, (0, self.entries + tokens - self.log_sizes.shape[1]))

    def all_rotary(self) -> Tensor | None:
        """Rotary positions of every cached entry, [B, axes, entries]; None: not known."""
        if self.rotary is None or self.rotary_shift is None:
            return None
        later = self._later(self.columns).to(self.rotary.device) - self.rotary_shift[:, None]
        return torch.cat([self.rotary, later[:, None].expand(-1, self.rotary.shape[1], -1)], dim=2)

    def _later(self, columns: Tensor | None) -> Tensor:
        """The columns of entries after the prefill's, which are as many as ``columns``."""
        assert columns is not None
        later = max(0, self.entries - columns.shape[1])
        return torch.arange(self.seen - later, self.seen, device=columns.device)

    @staticmethod
    def _with_later(held: Tensor | None, later: Tensor, shift: Tensor | None = None) -> Tensor:
        """``held`` [B, n] of the prefill's entries, and the columns ``later`` [m] less ``shift``
        [B] behind them."""
        assert held is not None
        if not len(later):
            return held
        tail = later.to(held.device).expand(held.shape[0], -1)
        if shift is not None:
            tail = tail - shift.to(held.device)[:, None]
        return torch.cat([held, tail], dim=1)

    def keep_entries(self, index: Tensor, next_position: Tensor | None, padded: bool) -> None:
        """Keep the cached entries at ``index`` [B, n'] (−1 = padding).

        Args:
            next_position: [B] original position of the next token, which is to stand at the number
                of real entries; None: positions go on as they are.
            padded: whether any entry is padding.
        """
        columns, slots, places = self.all_columns(), self.all_slots(), self.all_places()
        sizes, rotary = self.all_log_sizes(), self.all_rotary()
        before = self.entries
        # what was offloaded arrives there out of turn: taken back first
        away = self.keys.device != columns.device
        if away:
            self.prefetch()
        place = index.clamp(min=0)
        gather = place[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[-1])
        self.keys, self.values = self.keys.gather(2, gather), self.values.gather(2, gather)
        if away:
            self.offload()
        moved = self.slots is not self.columns
        self.columns = columns.gather(1, place).masked_fill(index < 0, -1)
        self.slots = self.columns
        if moved:
            self.slots = slots.gather(1, place).masked_fill(index < 0, -1)
        if sizes is not None:
            self.log_sizes = sizes.gather(1, place)
        if rotary is not None:
            self.rotary = rotary.gather(2, place[:, None].expand(-1, rotary.shape[1], -1))
        self.missing += before - index.shape[1]
        self.padded, self.behind = padded, 0
        real = (self.columns >= 0).sum(1)
        if self.places is not None or next_position is not None:
            self.places = places.gather(1, place)
        if next_position is not None:
            self.shift = self.place_shift = next_position.to(real.device) - real
            if self.rotary is not None:
                self.rotary_shift = self.seen - real
        self.gaps = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the batch rows of all that is held."""
        held = ("keys", "values") if self.entries else ()
        together = self.slots is self.columns
        for name in (*held, *self._per_row):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, change(value))
        if together:
            self.slots = self.columns

    def crop(self, max_length: int) -> None:
        """Remove the newest tokens (transformers' argument: the new length, or −n tokens; from 5.24
        on the latter only, so that 0 removes nothing).

        Raises:
            NotImplementedError: the cut would reach into the compressed prompt.
        """
        if (
            max_length == 0
            and "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters
        ):
            return
        remove = -max_length if max_length < 0 else self.seen - max_length
        if remove <= 0 or not self.is_initialized:
            return
        later = self.entries - (self.columns.shape[1] if self.columns is not None else 0)
        if remove > later + self.behind:
            raise NotImplementedError(
                f"crop({max_length}) would cut into the images of a prompt compressed by tokprune; "
                f"only the tokens after them ({later + self.behind}) can be removed"
            )
        if (cut := remove - later) > 0:
            self.behind -= cut
            together = self.slots is self.columns
            for name in self._per_entry:
                if (value := getattr(self, name)) is not None:
                    setattr(self, name, value[..., : value.shape[-1] - cut])
            if together:
                self.slots = self.columns
        self._take_off(remove)

    def _take_off(self, tokens: int) -> None:
        """Remove the newest entries."""
        left = self.entries - tokens
        self.keys, self.values = self.keys[..., :left, :], self.values[..., :left, :]

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self._forget()


def cache_argument(model: Any) -> str:
    """What a model calls its KV cache: ``past_key_values``, from transformers 5.24 on ``cache``."""
    named = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in named else "past_key_values"


def cache_in(call: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a call, under any of its names; None where there is
    none."""
    named = (call.get(name) for name in ("cache", "past_key_values", "past_key_value"))
    return next((cache for cache in named if cache is not None), None)


def seen(cache: Any) -> int:
    """Tokens of the conversation that a cache stands for (read from the device for an ordinary
    static one)."""
    if cache is None:
        return 0
    known = next((own for own in cache.layers if isinstance(own, CompressedLayer)), None)
    return int(cache.get_seq_length()) if known is None else known.seen


def check_cache(cache: Any) -> None:
    """Refuse caches whose entries we cannot shorten per layer.

    Raises:
        UnsupportedModelError: ``past_key_values`` is neither a plain :class:`DynamicCache` nor a
            plain :class:`~transformers.StaticCache`.
    """
    if cache is None or type(cache) in (DynamicCache, StaticCache):
        return
    kind = type(cache).__name__
    if LEGACY:
        raise UnsupportedModelError(
            f"past_key_values={kind} was not made by a patched model: its layers cannot hold "
            "different numbers of tokens; patch the model before the first turn, or start with "
            "past_key_values=None"
        )
    why = "layers then hold different numbers of tokens"
    if kind == "QuantizedCache":
        why = "its layers hold quantised keys without the columns that they stand for"
    raise UnsupportedModelError(
        f"past_key_values={kind} is not supported with visual-token compression: {why}; use "
        "transformers.DynamicCache (the default) or StaticCache"
    )


def brought_back(cache: Any) -> None:
    """Have this device wait for keys and values that an offloaded cache is fetching ahead, before
    any but its own ``update`` reads them."""
    if getattr(cache, "offloading", False):
        torch.cuda.current_stream().wait_stream(cache.prefetch_stream)


def compressed_layer(cache: DynamicCache, layer: int) -> CompressedLayer:
    """The cache's layer as a :class:`CompressedLayer`, converted in place where it is not yet."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    current: Any = cache.layers[layer]
    if not isinstance(current, CompressedLayer):
        current = CompressedLayer.wrap(current)
        cache.layers[layer] = current
    return current
