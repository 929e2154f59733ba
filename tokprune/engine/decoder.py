"""Hooks inside the decoder: scores, drops, masks and positions per layer, in prefill and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.cache import CompressedLayer, compressed_layer
from tokprune.engine.compat import DynamicCache
from tokprune.engine.contracts import (
    Attention,
    CachePolicy,
    DecoderRun,
    DecoderStage,
    KeepDecision,
    ScoringLayer,
    SequenceView,
    visible_rows,
)
from tokprune.engine.masks import decoder_mask
from tokprune.engine.shorten import take
from tokprune.operators.attention import attention_rows


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, H, L, d] in the half-split convention; cos, sin [B, L, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


class LayerCalls:
    """What prefill and step passes share: one layer call's mask and positions, computed once
    per distinct sequence and reused by all layers that see it."""

    def __init__(
        self, rotary: Any, backend: str, window: int | None, norm: Any, legacy: bool = False
    ) -> None:
        self.rotary, self.backend, self.window = rotary, backend, window
        #: the decoder's final norm
        self.norm = norm
        #: layers of transformers 4.37: masks of full shape, and no rotary embeddings from outside
        self.legacy = legacy
        self._embeddings: dict[tuple[int, int], tuple[Tensor, Any]] = {}
        self._masks: dict[tuple[int, ...], tuple[Any, Tensor | None]] = {}

    def embeddings(
        self, hidden: Tensor, position: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Shifted positions [B, q] and their rotary embeddings."""
        key = (id(position), id(shift))
        if key not in self._embeddings:
            shifted = position
            if shift is not None:
                shifted = position - shift.to(position.device)[:, None]
            shifted = shifted.clamp(min=0).to(hidden.device)
            # keep the keys' objects alive, or their ids could be given to others
            self._embeddings[key] = (shifted, (self.rotary(hidden, shifted), position, shift))
        shifted, (pair, *_) = self._embeddings[key]
        if pair[0].device != hidden.device:
            pair = tuple(t.to(hidden.device) for t in pair)
        return shifted, pair

    def mask(
        self, hidden: Tensor, keys: int, valid: Callable[[], Tensor | None],
        name: tuple[Any, ...], positions: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:  # fmt: skip
        """The mask of ``keys`` keys; layers that give the same ``name`` share it, and only the
        first of them works out which keys are ``valid``."""
        key = (keys, *(id(n) for n in name))
        if key not in self._masks:
            mask = decoder_mask(
                self.backend, hidden.shape[1], keys, valid(), hidden.dtype, hidden.device,
                positions, self.window,
            )  # fmt: skip
            if self.legacy and mask is not None and mask.dim() == 4:
                mask = mask.expand(hidden.shape[0], -1, -1, -1)
            self._masks[key] = (name, mask)
        mask = self._masks[key][1]
        return mask if mask is None or mask.device == hidden.device else mask.to(hidden.device)

    def place(self, kwargs: dict[str, Any], position: Tensor, embeddings: Any) -> None:
        """Hand positions to a layer's call."""
        kwargs["position_ids"] = position
        if not self.legacy:
            kwargs["position_embeddings"] = embeddings


@dataclass(frozen=True)
class Drop:
    """One drop before decoder layer ``layer``: ``segment`` [B, L] of the sequence before it,
    ``index`` [B, L'] old place of every entry after it (−1 = padding), and ``group`` [B, L] of a
    merge (see :class:`KeepDecision`)."""

    layer: int
    segment: Tensor
    index: Tensor
    group: Tensor | None


class PrefillPass:
    """One prefill with images through the decoder."""

    def __init__(
        self,
        calls: LayerCalls,
        stages: tuple[DecoderStage, ...],
        sequence: SequenceView,
        native: SequenceView,
        cache: DynamicCache | None,
        past: int,
        attention_mask: Tensor | None,
    ) -> None:
        self.calls, self.stages, self.sequence, self.native = calls, stages, sequence, native
        self.runs: list[DecoderRun] = [stage.start() for stage in stages]
        self.original_length, self.cache, self.past = native.column.shape[1], cache, past
        self.attention_mask = attention_mask
        #: the language model's own masks and positions are not those of the current sequence
        self.detached = False
        self.sequences: list[SequenceView] = []
        self.drops: list[Drop] = []
        #: rotary positions that each layer worked with
        self.positions: list[Tensor] = []
        #: input of the attention or MLP module that is running in a layer with transition taps
        self.module_input: Tensor | None = None
        self._shifts: dict[tuple[int, int], tuple[Any, Tensor]] = {}
        self._past_valid: Tensor | None = None
        self._policy_lengths: dict[int, list[int]] = {}

    @property
    def compressed(self) -> bool:
        return self.sequence is not self.native

    @property
    def total(self) -> int:
        """Tokens of the conversation up to the end of this forward, before any compression."""
        return self.past + self.original_length

    def to(self, device: torch.device) -> None:
        if self.sequence.column.device != device:
            sequence = self.sequence
            for name in ("column", "position", "segment", "after", "tag", "next_position"):
                value = getattr(sequence, name)
                if value is not None:
                    setattr(sequence, name, value.to(device))

    # ------------------------------------------------------------------ one layer

    def prepare(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Before a layer: let the runs drop tokens, then announce what the layer is to see."""
        self.to(hidden.device)
        for stage, run in zip(self.stages, self.runs):
            if number in stage.prune_layers:
                scoring = _Scoring(self, number, layer)
                keep = run.before_layer(number, hidden, self.sequence, scoring)
                if keep is not None:
                    hidden = self._drop(number, hidden, keep)
        self.sequences.append(self.sequence)
        self.positions.append(self.sequence.position)
        cached = self._cached(number)
        if self.compressed or isinstance(cached, CompressedLayer):
            self._announce(number, hidden, kwargs)
        return hidden

    def _cached(self, number: int) -> Any:
        if self.cache is None or len(self.cache.layers) <= number:
            return None
        return self.cache.layers[number]

    def _drop(self, number: int, hidden: Tensor, keep: KeepDecision) -> Tensor:
        sequence = self.sequence
        counts = keep.counts
        if counts is None:
            most = sequence.segments
            one_hot = (sequence.segment[:, :, None] == torch.arange(most, device=hidden.device)) & (
                keep.mask[:, :, None]
            )
            read = one_hot.sum(1).tolist()  # adaptive: the numbers must reach the host
            counts = [row[: len(own)] for row, own in zip(read, sequence.counts)]
        if counts == sequence.counts:
            return hidden
        lengths = [
            n - sum(old) + sum(new)
            for n, old, new in zip(sequence.lengths, sequence.counts, counts)
        ]
        longest = max(lengths)
        stays = sequence.valid & (keep.mask | ~sequence.visual)
        arange = torch.arange(stays.shape[1], device=hidden.device)
        key = torch.where(stays, arange if keep.order is None else keep.order, -1)
        top = key.sort(dim=1, stable=True)
        index = top.indices.masked_fill(top.values < 0, -1)[:, key.shape[1] - longest :]
        padded = min(lengths) < longest
        self.sequence = take(sequence, index, counts, lengths, padded, keep.positions == "compact")
        self.detached = True
        self.drops.append(Drop(number, sequence.segment, index, keep.group))
        hidden = hidden if keep.hidden is None else keep.hidden
        place = index.clamp(min=0)
        for run in self.runs:
            run.dropped(number, place)
        return hidden.gather(1, place[:, :, None].expand(-1, -1, hidden.shape[2]))

    def _shift(self, past_shift: Tensor | None) -> Tensor | None:
        """[B] original minus layer position of the next token, for layers of this sequence."""
        key = (id(self.sequence), id(past_shift))
        if key not in self._shifts:
            here = self.sequence.next_position
            shift = self.native.next_position.to(here.device) - here
            if past_shift is not None:
                shift = shift + past_shift.to(shift.device)
            self._shifts[key] = ((self.sequence, past_shift), shift)
        return self._shifts[key][1]

    def _announce(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        sequence, past_shift, entries = self.sequence, None, 0
        past_padded, past_columns = False, None
        if self.cache is not None:
            layer = compressed_layer(self.cache, number)
            entries, past_shift = layer.entries, layer.shift
            if entries:
                past_columns = layer.all_columns()
                past_padded = layer.padded
                if not past_padded and self.attention_mask is not None and self.past_mask_padded():
                    real = self.attention_mask[:, : self.past].gather(1, past_columns) != 0
                    past_columns = past_columns.masked_fill(~real, -1)
                    layer.columns, layer.padded, past_padded = past_columns, True, True
            columns = self._columns()
            layer.expect(columns, self.original_length, sequence.padded, self._shift(past_shift))
        position, embeddings = self.calls.embeddings(hidden, sequence.position, past_shift)
        self.positions[-1] = position
        window = None
        if self.calls.window is not None:
            window = (position, position)
            if self.cache is not None:
                window = compressed_layer(self.cache, number).window_positions(position)
        if not (self.detached or entries):
            return  # the language model made masks and positions for this very sequence

        def valid() -> Tensor | None:
            if not (sequence.padded or past_padded):
                return None
            if not entries:
                return sequence.valid
            before = sequence.valid.new_ones(len(sequence.valid), entries)
            if past_columns is not None and past_padded:
                before = (past_columns >= 0).to(before.device)
            return torch.cat([before, sequence.valid], dim=1)

        kwargs["attention_mask"] = self.calls.mask(
            hidden, entries + hidden.shape[1], valid,
            (sequence, past_columns if past_padded else None, window and position), window,
        )  # fmt: skip
        self.calls.place(kwargs, position, embeddings)

    def _columns(self) -> Tensor:
        """Columns of this sequence counted from the start of the conversation; one object per
        sequence, so that decode steps recognise layers that hold the same tokens."""
        if not self.past:
            return self.sequence.column
        key = (id(self.sequence), -1)
        if key not in self._shifts:
            column = self.sequence.column
            self._shifts[key] = (self.sequence, torch.where(column < 0, -1, column + self.past))
        return self._shifts[key][1]

    def past_mask_padded(self) -> bool:
        """Whether the cached part of the prompt holds padding (read once, later turns only)."""
        if self._past_valid is None:
            assert self.attention_mask is not None
            self._past_valid = (self.attention_mask[:, : self.past] != 0).all().cpu()
        return not bool(self._past_valid)

    # ------------------------------------------------------------------ taps and end

    def attention(self, number: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        sequence = self.sequence
        past = k.shape[2] - q.shape[2]
        valid, window = self.visible_keys(number, past, sequence, self.positions[-1])
        position = self.positions[-1]
        attention = Attention(
            q, k, v, scale, causal=True, valid=valid, past=past, window=window,
            rotary=lambda: self.calls.embeddings(q, position, None)[1],
        )  # fmt: skip
        for stage, run in zip(self.stages, self.runs):
            if number in stage.taps:
                run.attention(number, attention, sequence)

    def visible_keys(
        self, number: int, past: int, sequence: SequenceView, position: Tensor
    ) -> tuple[Tensor | None, tuple[Tensor, int] | None]:
        """Of a layer's ``past`` cached keys and those of ``sequence``: which are real, [B, keys]
        (None: all), and their rotary positions with the window's width where attention slides."""
        cached, device = self._cached(number), sequence.column.device
        batch = len(sequence.column)
        before = None
        if past and isinstance(cached, CompressedLayer):
            before = cached.all_columns()[:, :past] >= 0 if cached.padded else None
        elif past and self.attention_mask is not None:
            before = self.attention_mask[:, :past] != 0
        valid = sequence.valid if sequence.padded or before is not None else None
        if past and valid is not None:
            before = valid.new_ones(batch, past) if before is None else before.to(device)
            valid = torch.cat([before, valid], dim=1)
        if self.calls.window is None:
            return valid, None
        old = getattr(cached, "positions", None)
        old = (
            torch.arange(past, device=device).expand(batch, past)
            if old is None
            else (old[:, :past].to(device))
        )
        return valid, (torch.cat([old, position], dim=1), self.calls.window)

    def cached(self, number: int, lengths: list[int]) -> list[int]:
        """KV entries per batch row of a layer after this prefill, padding left out."""
        return (
            self._policy_lengths.get(number, lengths)
            if self.cache is not None
            else [0 for _ in lengths]
        )

    def finish(self) -> None:
        """End of the prefill: methods that prune the KV cache do it now."""
        if self.cache is None:
            return
        for stage, run in zip(self.stages, self.runs):
            if not stage.has_cache_policy:
                continue
            policy = run.after_prefill(self.sequences)
            if policy is None:
                continue
            self._policy_lengths = policy.lengths
            for number, index in policy.index.items():
                self._keep_entries(number, index, policy)

    def _keep_entries(self, number: int, index: Tensor, policy: CachePolicy) -> None:
        assert self.cache is not None
        sequence = self.sequences[number]
        ordinary = not isinstance(self._cached(number), CompressedLayer)
        layer = compressed_layer(self.cache, number)
        assert layer.columns is not None
        # this prefill's entries are the newest; a sliding layer may hold a part of them only
        earlier = layer.entries - sequence.column.shape[1]
        columns = layer.all_columns()
        if ordinary and self.attention_mask is not None:
            real = self.attention_mask.to(columns.device).gather(1, columns) != 0
            layer.columns = columns.masked_fill(~real, -1)
        if self.calls.window is not None and layer.positions is None:
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


class _Scoring(ScoringLayer):
    def __init__(self, prefill: PrefillPass, number: int, layer: Any) -> None:
        self.prefill, self.number, self.layer = prefill, number, layer

    def probabilities(self, hidden: Tensor, rows: Tensor, sequence: SequenceView) -> Tensor:
        attn = self.layer.self_attn
        d = attn.head_dim
        cached = self.prefill._cached(self.number)
        past_shift = getattr(cached, "shift", None)
        position, (cos, sin) = self.prefill.calls.embeddings(hidden, sequence.position, past_shift)
        x = self.layer.input_layernorm(hidden)
        batch, length = x.shape[:2]
        chosen = x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))
        q = attn.q_proj(chosen).view(batch, rows.shape[1], -1, d).transpose(1, 2)
        k = attn.k_proj(x).view(batch, length, -1, d).transpose(1, 2)
        cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
        pick = rows[:, :, None].expand(-1, -1, d)
        q, k = rotate(q, cos.gather(1, pick), sin.gather(1, pick)), rotate(k, cos, sin)
        past = 0
        if cached is not None and getattr(cached, "is_initialized", False):
            past = cached.keys.shape[-2]
            k = torch.cat([cached.keys, k], dim=2)
        valid, window = self.prefill.visible_keys(self.number, past, sequence, position)
        allowed = visible_rows(rows + past, past + length, valid, window)
        scaling = getattr(attn, "scaling", None)  # modules of transformers 4.37: 1/√d
        return attention_rows(q, k, scaling, allowed)[..., past:]

    def final_norm(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.prefill.calls.norm(hidden)
        return normed


class StepPass:
    """A forward without images on a cache that holds compressed layers."""

    def __init__(
        self, calls: LayerCalls, cache: DynamicCache, attention_mask: Tensor | None
    ) -> None:
        self.calls, self.cache, self.attention_mask = calls, cache, attention_mask
        self._new_valid: tuple[Tensor, bool] | None = None
        #: tokens of the conversation up to the end of this forward, before any compression
        self.total = 0

    def prepare(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        cached = self.cache.layers[number] if len(self.cache.layers) > number else None
        if not isinstance(cached, CompressedLayer):
            return hidden
        batch, q = hidden.shape[:2]
        start = cached.get_seq_length()
        self.total = start + q
        new = self._new(q, hidden.device)
        padded = cached.padded or new is not None

        def valid() -> Tensor | None:
            if not padded:
                return None
            old = cached.all_columns().to(hidden.device) >= 0
            return torch.cat([old, old.new_ones(batch, q) if new is None else new], dim=1)

        position = kwargs["position_ids"]
        if cached.shift is not None:
            position, embeddings = self.calls.embeddings(hidden, position, cached.shift)
            self.calls.place(kwargs, position, embeddings)
        window = None
        if self.calls.window is not None:
            window = cached.window_positions(position.expand(batch, q))
        name = (cached.columns if padded else None, cached if window else None)
        kwargs["attention_mask"] = self.calls.mask(hidden, cached.entries + q, valid, name, window)
        if new is None:
            cached.expect_step()
        else:
            arange = torch.arange(start, start + q, device=hidden.device)
            cached.expect(arange.masked_fill(~new, -1), q, True, cached.shift)
        return hidden

    def _new(self, q: int, device: torch.device) -> Tensor | None:
        """Which of the new tokens are real, [B, q]: a later chat turn of a batch may be padded.
        None: all of them."""
        if q == 1 or self.attention_mask is None:
            return None
        if self._new_valid is None:
            new = self.attention_mask[:, -q:] != 0
            self._new_valid = (new, not bool(new.all()))
        new, padded = self._new_valid
        return new.to(device) if padded else None
