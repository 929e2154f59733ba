"""One prefill with images through the decoder: scores, drops, and what each layer is to see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from tokprune.engine.cache import CompressedLayer, cache_in
from tokprune.engine.check import Contracts
from tokprune.engine.contracts import (
    Attention,
    DecoderRun,
    DecoderStage,
    KeepDecision,
    Rectify,
    SequenceView,
)
from tokprune.engine.drops import Drop, shortened
from tokprune.engine.guesses import Guesses
from tokprune.engine.layer_calls import LayerCalls, View
from tokprune.engine.model import Block, Deep
from tokprune.engine.positions import shifted
from tokprune.engine.prefill_cache import PrefillCache
from tokprune.engine.rectify import Rectifier
from tokprune.engine.scoring_layer import LayerAhead
from tokprune.engine.shorten import InputDrop, merge_deep
from tokprune.engine.stands_for import in_decoder
from tokprune.engine.static_cache import freeze
from tokprune.engine.tap import Call
from tokprune.errors import UnsupportedModelError


class PrefillPass:
    """The runs of all decoder stages, and the sequence as it is now. ``native``: the prompt before
    anything was dropped; ``input``: what goes before its first layer; ``deep``: features that the
    model adds between its layers."""

    def __init__(
        self,
        calls: LayerCalls,
        stages: tuple[DecoderStage, ...],
        native: SequenceView,
        cache: PrefillCache,
        contracts: Contracts,
        ahead: Callable[[Block, tuple[Any, ...], dict[str, Any]], Call],
        input_drop: InputDrop | None = None,
        deep: list[Deep] | None = None,
        guesses: int = 0,
        rectify: Rectify | None = None,
    ) -> None:
        #: what rectified attention adds
        self.rectifier = None if rectify is None else Rectifier(rectify, calls, native)
        #: the attention call of a layer that has not run
        self.ahead = ahead
        self.calls, self.stages, self.native = calls, stages, native
        self.sequence = native
        self.guesses = Guesses(guesses)
        self.cache, self.contracts = cache, contracts
        self.input, self.deep = input_drop, deep or []
        if input_drop is not None:
            self.deep = [merge_deep(own, input_drop) for own in self.deep]
        #: [B, L'] places in the untouched prompt of the tokens alive, for deep features
        self.origin: Tensor | None = None
        self.runs: list[DecoderRun] = [contracts.run(stage, stage.start()) for stage in stages]
        #: the sequence of each layer, and the rotary positions that it worked with
        self.sequences: list[SequenceView] = []
        self.positions: list[Tensor] = []
        self.drops: list[Drop] = []
        #: the arguments of the layer that runs
        self.kwargs: dict[str, Any] = {}

    @property
    def total(self) -> int:
        """Tokens of the conversation up to the end of this forward, before any compression."""
        return self.cache.past + self.cache.original

    def to(self, device: torch.device) -> None:
        sequence = self.sequence
        if sequence.column.device != device:
            together = sequence.slot is sequence.column
            for name in ("column", "slot", "position", "segment", "after", "tag", "shift"):
                if (value := getattr(sequence, name)) is not None:
                    setattr(sequence, name, value.to(device))
            if together:
                sequence.slot = sequence.column

    # ------------------------------------------------------------------ one layer

    def prepare(
        self, number: int, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a layer: let the runs drop tokens, then place what is left in its arguments."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if not number:
            self.cache.cache = cache_in(kwargs)
            # a copy: some models count their positions on in place
            self.native.position = self.calls.rotary_position(kwargs, hidden).clone()
        self.to(hidden.device)
        if not number and self.input is not None:
            hidden = self._shorten_input(hidden, self.input)
        for stage, run in zip(self.stages, self.runs):
            if number in stage.prune_before:
                ahead = LayerAhead(self, number, block, args, kwargs)
                seen, sequence = self.guesses.cut(hidden), self.guesses.sequence(self.sequence)
                scoring = self.guesses.scoring(ahead, hidden)
                keep = run.before_layer(number, seen, sequence, scoring)
                if keep is not None:
                    self.contracts.keep_decision(run, number, keep, seen, sequence)
                    hidden = self._drop(number, hidden, keep)
        self.sequences.append(self.sequence)
        args, kwargs, position = self.arguments(number, block, hidden, args, kwargs, announce=True)
        self.positions.append(position)
        self.kwargs = kwargs
        return args, kwargs

    def arguments(
        self, number: int, block: Block, hidden: Tensor, args: tuple[Any, ...],
        kwargs: dict[str, Any], announce: bool = False,
    ) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:  # fmt: skip
        """Those of a layer that runs on the sequence of now, and its rotary positions;
        ``announce``: tell the cache."""
        sequence, kwargs = self.sequence, dict(kwargs)
        if not block.has_attention:
            return self._linear(hidden, args, kwargs)
        if sequence is self.native and not isinstance(self.cache.layer(number), CompressedLayer):
            return *_with_hidden(args, kwargs, hidden), sequence.position
        view, past_shift = self.cache.view(number, sequence)
        position = shifted(sequence.position, past_shift)
        rectifier = self.rectifier
        made = None if rectifier is None else rectifier.table(kwargs, block)
        kwargs["attention_mask"] = self.calls.mask(
            kwargs.get("attention_mask"), view, block, hidden
        )
        self._place(block, view, position, past_shift, kwargs)
        keys = None
        if rectifier is not None:
            held = self.cache.layer(number) if self.cache.past else None
            shift = lambda: self._behind(past_shift)  # noqa: E731
            keys = rectifier.prefill(
                number, block, held, sequence, view, position, made, shift, kwargs, hidden
            )
        if announce:
            self.cache.announce(number, sequence, view, block.window, keys)
        rest = tuple(self._per_token(x) for x in args[1:])
        return *_with_hidden((hidden, *rest) if args else args, kwargs, hidden), position

    def _behind(self, past_shift: Tensor | None) -> Tensor:
        """By how much the positions of later tokens are below their columns, [B]."""
        behind = self.total - self.cache.native_next
        for shift in (self.sequence.shift, past_shift):
            if shift is not None:
                behind = behind + shift.to(behind.device)
        return behind

    def _place(
        self, block: Block, view: View, position: Tensor, past_shift: Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        sequence = self.sequence
        moved = sequence.shift is not None or past_shift is not None
        if sequence is not self.native or moved:
            column = sequence.column
            self.calls.place(kwargs, block, view, column, position if moved else None)
        if kwargs.get("cache_position") is not None:  # up to transformers 5.3
            past, queries = self.cache.past, view.queries
            kwargs["cache_position"] = torch.arange(
                past, past + queries.shape[1], device=queries.device
            )

    def _linear(
        self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
        """A layer without keys runs on the shorter sequence; its mask says what is no padding."""
        sequence = self.sequence
        if sequence is not self.native:
            kwargs["attention_mask"] = sequence.valid if sequence.padded else None
        return *_with_hidden(args, kwargs, hidden), sequence.position

    def _per_token(self, value: Any) -> Any:
        """What else a layer gets for every token [B, L, D], at the tokens that are left."""
        length = self.native.column.shape[1]
        if self.origin is None or not isinstance(value, Tensor) or value.dim() != 3:
            return value
        if value.shape[1] != length:
            return value
        return value.gather(1, self.origin[:, :, None].expand(-1, -1, value.shape[2]))

    # ------------------------------------------------------------------ drops

    def _shorten_input(self, hidden: Tensor, drop: InputDrop) -> Tensor:
        """The drop before layer 0: what goes at the language-model input."""
        sequence = self.sequence
        arange = torch.arange(hidden.shape[1], device=hidden.device)
        stays = sequence.valid & (drop.mask.to(hidden.device) | ~sequence.visual)
        key = torch.where(stays, arange, -1)
        # marks, masks and images are those of the place, positions those of the token
        column = None
        if not drop.ordered:
            column = torch.where(sequence.valid, drop.column.to(hidden.device), -1)
        self.sequence, index = shortened(
            sequence, key, drop.counts, drop.compact, self.native, column=column
        )
        self.sequence.entering = drop.counts
        return self._take(hidden, index)

    def _drop(self, number: int, hidden: Tensor, keep: KeepDecision) -> Tensor:
        shorter = self.guesses.survivors(self.sequence, keep, self.native)
        if shorter is None:
            return hidden
        before, (self.sequence, index) = self.sequence, shorter
        if self.rectifier is not None:
            self.sequence.size = in_decoder(self.rectifier.rectify, hidden, before, keep, index)
        self.drops.append(Drop(number, before.segment, index, keep.group))
        hidden = hidden if keep.hidden is None else self.guesses.hidden(keep.hidden, hidden)
        place = self.guesses.cut(index.clamp(min=0))
        for run in self.runs:
            run.dropped(number, place)
        return self._take(hidden, index)

    def _take(self, hidden: Tensor, index: Tensor) -> Tensor:
        place = index.clamp(min=0)
        origin = self.origin
        self.origin = place if origin is None else origin.to(place.device).gather(1, place)
        return hidden.gather(1, place[:, :, None].expand(-1, -1, hidden.shape[2]))

    def add_deep(self, number: int, hidden: Tensor) -> Tensor | None:
        """After a layer: what the model adds there, at the tokens that are left."""
        for own in self.deep:
            if own.layer == number:
                values = own.at(self.origin).to(hidden.device, hidden.dtype)
                if self.origin is not None:
                    gone = self.sequence.column.to(values.device) < 0
                    values = values.masked_fill_(gone[:, :, None], 0)
                return values.add_(hidden)
        return None

    # ------------------------------------------------------------------ taps and end

    def attention(self, number: int, call: Call) -> None:
        """Right after the attention of a tapped layer."""
        attention = self.guesses.attention(self.attention_of(call, self.kwargs))
        for stage, run in zip(self.stages, self.runs):
            if number in stage.taps:
                run.attention(number, attention, self.guesses.sequence(self.sequence))

    @staticmethod
    def attention_of(call: Call, kwargs: dict[str, Any]) -> Attention:
        """The attention of a layer called with ``kwargs``."""

        def rotary() -> Any:
            table = call.rotary or kwargs.get("position_embeddings")
            if table is None or table[0].dim() > 3:
                raise UnsupportedModelError(
                    "the method reads rotary tables, and this model's layers get several of them "
                    "in this release of transformers; use a newer one"
                )
            return table

        return Attention(
            call.query, call.key, call.value, call.scaling, causal=True, mask=call.mask,
            past=call.key.shape[2] - call.query.shape[2], window=call.window, softcap=call.softcap,
            rotary=rotary, bias=call.bias,
        )  # fmt: skip

    def transition(
        self, number: int, name: Literal["attention", "mlp"], before: Tensor, after: Tensor
    ) -> None:
        """After a module of a layer with transition taps."""
        before, after = self.guesses.cut(before), self.guesses.cut(after)
        for stage, run in zip(self.stages, self.runs):
            if number in stage.transition_layers:
                run.transition(number, name, before, after, self.guesses.sequence(self.sequence))

    def finish(self) -> None:
        """End of the prefill: methods that prune the KV cache do it now, and static caches get
        their shape."""
        if self.cache.cache is None:
            return
        self.cache.mark_ends()
        for stage, run in zip(self.stages, self.runs):
            if stage.has_cache_policy:
                policy = run.after_prefill(self.sequences)
                if policy is not None:
                    self.contracts.cache_policy(run, policy, self.sequences)
                    self.cache.keep(policy, self.sequences)
        freeze(self.cache.cache)


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with other hidden states."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}
