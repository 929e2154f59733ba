"""The masked oracle through ``generate()``: right for any family, and told nothing about it.

Dropping token j before layer l must equal running the unpruned model with j's key hidden from all
queries at layers ≥ l. The unpruned model runs ``generate()`` on a plain cache, every step forced;
at each layer its *own* mask is taken, and the columns of dropped tokens are hidden in it. Positions
are its own, too, but where the trace says that they were closed up: there the oracle works them out
once more (:func:`closed_positions`) and has the model's rotary modules make the tables.

Where tokens were moved or merged, the unpruned model takes over the vectors that entered the
compressed layer: all is compared but the averages themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
import transformers
from torch import Tensor

from tokprune.engine.cache import cache_argument, cache_in
from tokprune.engine.contracts import Rectify
from tokprune.engine.model import Block
from tokprune.engine.positions import RotaryCall, made_by
from tokprune.families import bind
from tokprune.testing.rectified import Terms
from tokprune.testing.report import Fault
from tokprune.trace import LayerTrace, PrefillTrace


class _Forced(transformers.LogitsProcessor):
    """Makes ``generate`` choose given tokens."""

    def __init__(self, start: int, tokens: Tensor) -> None:
        self.start, self.tokens = start, tokens

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        step = min(input_ids.shape[1] - self.start, self.tokens.shape[1] - 1)
        rows = len(scores) // len(self.tokens)
        own = self.tokens[:, step].repeat_interleave(rows)
        return torch.full_like(scores, -torch.inf).scatter(1, own[:, None], 0.0)


@torch.no_grad()
def forced_logits(
    model: Any, inputs: dict[str, Tensor], continuation: Tensor, **options: Any
) -> Tensor:
    """Logits [B, 1 + steps, V] of ``generate()`` at the last prompt token and at every token of
    ``continuation`` [B, steps], which it is made to choose."""
    start, steps = inputs["input_ids"].shape[1], continuation.shape[1]
    out = model.generate(
        **inputs, max_new_tokens=steps + 1, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
        logits_processor=transformers.LogitsProcessorList([_Forced(start, continuation)]),
        **options,
    )  # fmt: skip
    return torch.stack(out.logits, dim=1)


def turned_logits(model: Any, inputs: dict[str, Tensor], continuation: Tensor, turn: int) -> Tensor:
    """:func:`forced_logits` where a second turn, the first ``turn`` tokens of ``continuation``, is
    fed in one forward on the cache of the first: logits [B, 2 + steps − turn, V] at the last
    token of the prompt, at the last of that turn, and at the others."""
    first, rest = continuation[:, :turn], continuation[:, turn:]
    out = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    cache = {cache_argument(model): out.past_key_values}
    later = forced_logits(model, with_turn(inputs, first), rest, **cache)
    return torch.cat([out.logits[0][:, None], later], dim=1)


def with_turn(inputs: dict[str, Tensor], turn: Tensor) -> dict[str, Tensor]:
    """Inputs of a second turn of text on the cache of the first: the whole conversation's ids, mask
    and, where the first turn had them, token types."""
    new = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
    if "mm_token_type_ids" in inputs:
        new["mm_token_type_ids"] = torch.zeros_like(turn)
    return {name: torch.cat([inputs[name], tokens], dim=1) for name, tokens in new.items()}


@dataclass
class Entering:
    """Hidden states [B, L', D] that entered each decoder layer of a prefill, by layer."""

    layers: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def recorded_layers(model: Any) -> Iterator[Entering]:
    """Record what enters the decoder layers of the next prefill; to be entered *inside* a
    ``compress`` block, so that drops have happened."""
    seen = Entering()

    def recorder(number: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            seen.layers.setdefault(number, args[0] if args else kwargs["hidden_states"])

        return hook

    with ExitStack() as stack:
        for number, block in enumerate(bind(model).parts.decoder_layers):
            handle = block.module.register_forward_pre_hook(recorder(number), with_kwargs=True)
            stack.callback(handle.remove)
        yield seen


def plain_cache(model: Any) -> dict[str, Any]:
    """An argument of ``generate`` that has all attention layers keep all keys."""
    config = bind(model).parts.language_model.config
    kinds = set(getattr(config, "layer_types", None) or [])
    if "linear_attention" in kinds:
        return {}
    return {cache_argument(model): transformers.DynamicCache()}


@torch.no_grad()
def generated_oracle(
    model: Any,
    inputs: dict[str, Tensor],
    trace: PrefillTrace,
    continuation: Tensor,
    seen: Entering | None = None,
    rectify: Rectify | None = None,
) -> Tensor:
    """What a compressed ``generate`` must give: logits [B, 1 + steps, V].

    Args:
        model: the same model, not patched.
        trace: of the compressed prefill.
        seen: what entered its layers, where tokens were moved or merged.
        rectify: what its attention was to make up for, by the sizes that the trace tells.

    Raises:
        Fault: the trace cannot be right.
    """
    run = _Oracle(model, inputs, trace, seen, rectify)
    with run.hooked():
        return forced_logits(model, inputs, continuation, **plain_cache(model))


class _Oracle:
    def __init__(
        self, model: Any, inputs: dict[str, Tensor], trace: PrefillTrace, seen: Entering | None,
        rectify: Rectify | None,
    ) -> None:  # fmt: skip
        self.parts = bind(model).parts
        self.terms = None if rectify is None else Terms(rectify, trace, self.parts)
        self.trace, self.seen = trace, seen
        self.length = inputs["input_ids"].shape[1]
        self.real = inputs["attention_mask"] != 0
        self.mask: Any = None
        self.calls: list[RotaryCall] = []
        #: rotary positions of the prompt [.., B, L], unpruned
        self.native: Tensor | None = None
        self.segment = _segments(trace, self.length)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        language_model = self.parts.language_model
        with ExitStack() as stack:

            def door(module: Any, args: Any, kwargs: Any) -> None:
                self.mask, self.calls = kwargs.get("attention_mask"), []

            handle = language_model.register_forward_pre_hook(door, with_kwargs=True)
            stack.callback(handle.remove)
            for module in self.parts.rotary:

                def rotary(module: Any, args: Any, kwargs: Any, output: Any) -> None:
                    self.calls.append(RotaryCall(module.forward, args, kwargs, output))

                handle = module.register_forward_hook(rotary, with_kwargs=True)
                stack.callback(handle.remove)
            for number, block in enumerate(self.parts.decoder_layers):
                handle = block.module.register_forward_pre_hook(
                    self._layer(number, block), with_kwargs=True
                )
                stack.callback(handle.remove)
            yield

    def _layer(self, number: int, block: Block) -> Callable[..., Any]:
        layer = self.trace.layers[number]
        view = _View.of(layer, self.segment, moved=self.seen is not None)

        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            batch, queries = hidden.shape[:2]
            prefill = queries == self.length
            ids = self.calls[0].ids
            ids = ids.expand(*ids.shape[:-2], batch, -1)
            if prefill:
                self.native = ids.clone()  # some models count on in place
                if self.seen is not None:
                    hidden = view.put(hidden, self.seen.layers[number])
            if block.has_attention:
                cache = cache_in(kwargs)
                held = cache.layers[number].get_seq_length() if len(cache.layers) > number else 0
                own = _bool(kwargs.get("attention_mask"), batch, queries, held + queries)
                seen = self._mask(own, view, layer, block, prefill)
                kwargs["attention_mask"] = _in_form(seen, kwargs.get("attention_mask"), hidden)
            self._positions(kwargs, ids, layer, view, prefill)
            if self.terms is not None and block.has_attention:
                self.terms.add(number, view.columns, block, kwargs, seen, prefill, hidden.dtype)
            if args:
                return (hidden, *args[1:]), kwargs
            kwargs["hidden_states"] = hidden
            return args, kwargs

        return hook

    # ------------------------------------------------------------------ masks

    def _mask(
        self, allowed: Tensor, view: _View, layer: LayerTrace, block: Block, prefill: bool
    ) -> Tensor:
        """What the layer's queries see of the keys [B, queries, keys], bool; ``allowed``: what its
        model lets them."""
        batch, queries, keys_ = allowed.shape
        window = block.window if block.window is not None and keys_ > block.window else None
        whole = None
        if isinstance(self.mask, dict):
            whole = _bool(self.mask.get("full_attention"), batch, queries, keys_)
        out = allowed.clone()
        for b in range(batch):
            closed = self._closed(layer, b)
            slots, columns = view.slots[b], view.columns[b]
            if prefill:
                seen = allowed[b][slots][:, slots]
                if window is not None and closed:
                    full = torch.ones(len(slots), len(slots), dtype=torch.bool).tril()
                    if whole is not None:
                        full = whole[b][slots][:, slots]
                    place = self._place(layer, view, b)
                    seen = _windowed(seen, full, slots, place, place, window)
                out[b, :, :] &= torch.eye(queries, dtype=torch.bool)
                out[b][columns[:, None], columns[None, :]] = seen
                continue
            last = allowed.shape[2]
            later = torch.arange(self.length, last)
            held = torch.isin(columns, view.kept[b])
            # seen or not as the token at their slots, and read at their columns
            at = torch.cat([slots[held], later])
            seen = allowed[b][:, at]
            if window is not None and (closed or self._counts_entries(layer, b)):
                full = torch.ones(1, len(at), dtype=torch.bool)
                after = self.shift_place(layer, view, b) + later
                place = torch.cat([self._place(layer, view, b)[held], after])
                seen = _windowed(seen, full, at, place[-1:], place, window)
            out[b] = False
            out[b][:, torch.cat([columns[held], later])] = seen
        return out | ~out.any(-1, keepdim=True)  # rows that see nothing: anything without NaN

    def _place(self, layer: LayerTrace, view: _View, row: int) -> Tensor:
        """Where windows count the tokens of a row: at their positions, or, where these have three
        axes, one after the other."""
        if self.native is not None and self.native.dim() == 2:
            return layer.position[row][layer.column[row] >= 0]
        return torch.arange(len(view.columns[row]))

    def shift_place(self, layer: LayerTrace, view: _View, row: int) -> int:
        """The place of the token after the prompt, less its column."""
        if self.native is not None and self.native.dim() == 2:
            _, shift = self._expected(layer, view, row)
            return int(self._native_next(row) - shift) - self.length
        return len(view.columns[row]) - self.length

    def _closed(self, layer: LayerTrace, row: int) -> bool:
        assert self.native is not None
        real = layer.column[row] >= 0
        native = self.native[..., row, layer.column[row][real]]
        return not torch.equal(layer.position[..., row, :][..., real], native)

    # ------------------------------------------------------------------ positions

    def _positions(
        self, kwargs: dict[str, Any], ids: Tensor, layer: LayerTrace, view: _View, prefill: bool
    ) -> None:
        assert self.native is not None
        new = ids.clone()
        changed = False
        for b in range(ids.shape[-2]):
            moved = not torch.equal(view.columns[b], view.tokens[b])
            closed = self._closed(layer, b)
            if not closed and not moved and not self._counts_entries(layer, b):
                continue
            changed = True
            positions, shift = self._expected(layer, view, b)
            if prefill:
                new[..., b, view.columns[b]] = positions
            else:
                new[..., b, :] = ids[..., b, :] - shift
        if not changed:
            return
        for name, table in kwargs.items():
            if name.startswith("position_embeddings") and table is not None:
                kwargs[name] = made_by(self.calls, table).again(new)
        if kwargs.get("position_ids") is not None and new.dim() == 2:
            kwargs["position_ids"] = new

    def _as_before(self, layer: LayerTrace, view: _View, row: int, got: Tensor) -> Tensor | None:
        """The shift of an earlier layer, in which the tokens had the same positions when they were
        closed up; None where there is none."""
        assert self.native is not None
        native = self.native[..., row, :]
        for earlier in self.trace.layers:
            if earlier is layer:
                return None
            real = earlier.column[row] >= 0
            tokens, slots = earlier.column[row][real], earlier.slot[row][real]
            want, shift = closed_positions(native, self.real[row], self.segment[row], tokens)
            # several tokens may stand at one column, but none at another one's slot
            place = torch.searchsorted(slots, view.slots[row])
            found = place < len(slots)
            if bool(found.all()) and torch.equal(want[..., place], got):
                return shift
        return None

    def _counts_entries(self, layer: LayerTrace, row: int) -> bool:
        """Whether the next token stands at the number of cached entries."""
        if layer.entries is None or layer.next_position is None:
            return False
        if self.native is None or self.native.dim() == 3:
            return False
        if self._entries_went(layer, row):
            return True
        # a policy that leaves the same tokens in every layer may find nothing else in this one
        entries = int(self.native[row, self.real[row]].min()) + int((layer.entries[row] >= 0).sum())
        return int(layer.next_position[row]) == entries and any(
            self._entries_went(earlier, row)
            for earlier in takewhile(lambda one: one is not layer, self.trace.layers)
        )

    @staticmethod
    def _entries_went(layer: LayerTrace, row: int) -> bool:
        """Whether a layer caches fewer tokens than it has run on."""
        if layer.entries is None:
            return False
        return int((layer.entries[row] >= 0).sum()) != int((layer.column[row] >= 0).sum())

    def _native_next(self, row: int) -> Tensor:
        assert self.native is not None
        return self.native[..., row, self.real[row]].max() + 1

    def _expected(self, layer: LayerTrace, view: _View, row: int) -> tuple[Tensor, Tensor]:
        """Positions of the survivors of a row [.., n], and the shift of what follows them."""
        assert self.native is not None
        native = self.native[..., row, :]
        got = layer.position[..., row, :][..., layer.column[row] >= 0]
        want, shift = got, self._native_next(row) * 0
        if self._closed(layer, row):
            want, shift = closed_positions(
                native, self.real[row], self.segment[row], view.tokens[row]
            )
            if not torch.equal(got, want):
                # what was closed up in an earlier layer, and stays as it was since
                earlier = self._as_before(layer, view, row, got)
                if earlier is None:
                    raise Fault(
                        f"batch row {row}: the positions of the trace are {got.tolist()}; closed "
                        f"up they should be {want.tolist()}"
                    )
                want, shift = got, earlier
        if self._counts_entries(layer, row):
            assert layer.next_position is not None
            start, first = int(layer.next_position[row]), int(native[self.real[row]].min())
            entries = first + int((layer.entries[row] >= 0).sum())  # type: ignore[index]
            if start not in (entries, int(self._native_next(row) - shift)):
                raise Fault(
                    f"batch row {row}: the token after the prompt has position {start}; it should "
                    f"be {entries} (entries in the cache) or {int(self._native_next(row) - shift)}"
                )
            shift = self._native_next(row) - start
        return want, shift


def closed_positions(
    native: Tensor, real: Tensor, segment: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Positions of the tokens ``kept`` [n] of a prompt, without gaps, and by how much what follows
    them moves back.

    With one axis (``native`` [L]) they are consecutive. With three [3, L], text counts on; of each
    image and axis the coordinates left become consecutive from the image's first position on, and
    the text goes on after the largest of them.
    """
    if native.dim() == 1:
        first = int(native[real].min())
        moved = first + torch.arange(len(kept))
        return moved, native[real].max() + 1 - (first + len(kept))
    out = torch.zeros(3, len(kept), dtype=native.dtype)
    shift = 0
    places = {int(c): i for i, c in enumerate(kept)}
    column = 0
    while column < len(segment):
        image = int(segment[column])
        if image < 0:
            if column in places:
                out[:, places[column]] = native[:, column] - shift
            column += 1
            continue
        own = (segment == image).nonzero().view(-1)
        left = [int(c) for c in own if int(c) in places]
        begin, end = int(native[:, own].min()), int(native[:, own].max()) + 1
        extent = 0
        for axis in range(3):
            values = sorted({int(native[axis, c]) for c in left})
            for c in left:
                rank = values.index(int(native[axis, c]))
                out[axis, places[c]] = begin - shift + rank
                extent = max(extent, rank + 1)
        shift += end - begin - extent
        column = int(own[-1]) + 1
    return out, torch.tensor(shift)


@dataclass
class _View:
    """Of each batch row, in the order of the layer's sequence: prompt ``columns`` that the oracle
    reads the tokens at, the ``slots`` that masks see them at, the columns that the cache keeps, and
    the true columns of the ``tokens``."""

    columns: list[Tensor]
    slots: list[Tensor]
    kept: list[Tensor]
    tokens: list[Tensor]

    @classmethod
    def of(cls, layer: LayerTrace, segment: Tensor, moved: bool) -> _View:
        columns, slots, kept, tokens = [], [], [], []
        for b in range(len(layer.column)):
            real = layer.column[b] >= 0
            own, slot = layer.column[b][real], layer.slot[b][real]
            if not bool((slot[1:] > slot[:-1]).all()):
                raise Fault(f"batch row {b}: slots {slot.tolist()} of a layer do not ascend")
            at = slot if moved else own
            if not moved and len(set(own.tolist())) != len(own):
                raise Fault(f"batch row {b}: two tokens stand at one prompt column")
            held = at
            if layer.entries is not None:
                left = layer.entries[b][layer.entries[b] >= 0]
                held = at[torch.isin(own, left)]
                if not bool(torch.isin(left, own).all()):
                    raise Fault(f"batch row {b}: a cache holds tokens that its layer had not")
            columns.append(at)
            slots.append(slot)
            kept.append(held)
            tokens.append(own)
        return cls(columns, slots, kept, tokens)

    def put(self, hidden: Tensor, entering: Tensor) -> Tensor:
        """Hidden states [B, L, D] with those that entered the compressed layer at their slots."""
        out = hidden.clone()
        for b, slots in enumerate(self.slots):
            own = entering[b, entering.shape[1] - len(slots) :]
            out[b, slots] = own.to(out.dtype)
        return out


def _segments(trace: PrefillTrace, length: int) -> Tensor:
    """[B, L] number of the image that each prompt column belongs to, −1 for text."""
    segment = torch.full((len(trace.original_lengths), length), -1)
    for image in trace.images:
        segment[image.row, image.columns] = image.number
    return segment


def _bool(mask: Tensor | None, batch: int, queries: int, keys: int) -> Tensor:
    """A model's own mask as [B, queries, keys] bool; None: causal."""
    if mask is None:
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        return seen.expand(batch, -1, -1)
    rows = mask[:, 0].expand(batch, -1, -1)
    return rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2


def _in_form(seen: Tensor, own: Tensor | None, hidden: Tensor) -> Tensor:
    """A mask [B, queries, keys] bool in the form of the model's own."""
    if own is None or own.dtype == torch.bool:
        return seen[:, None]
    blocked = torch.finfo(hidden.dtype).min
    return torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, blocked)[:, None]


def _windowed(
    own: Tensor, full: Tensor, columns: Tensor, queries: Tensor, keys: Tensor, window: int
) -> Tensor:
    """A window counted at the places of ``queries`` and ``keys``: of what a full layer sees those
    near enough, and what the model's own sliding mask shows beyond its window."""
    near = queries[:, None] - keys[None, :] < window
    far = columns[len(columns) - len(queries) :, None] - columns[None, :] >= window
    return (full & near) | (own & far)
