"""Hooks inside the decoder: scores, drops, masks and positions per layer, in prefill and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tokprune.engine.cache import CompressedLayer, compressed_layer
from tokprune.engine.masks import decoder_mask
from tokprune.engine.prompt import take
from tokprune.engine.stages import (
    Attention,
    CachePolicy,
    DecoderRun,
    DecoderStage,
    Keep,
    ScoringLayer,
    SequenceView,
)
from tokprune.operators.attention import attention_rows


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, H, L, d] in the half-split convention; cos, sin [B, L, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


class LayerCalls:
    """What prefill and step passes share: one layer call's mask and positions, computed once
    per distinct sequence and reused by all layers that see it."""

    def __init__(self, rotary: nn.Module, backend: str, window: int | None) -> None:
        self.rotary, self.backend, self.window = rotary, backend, window
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
        self, hidden: Tensor, keys: int, valid: Tensor | None, name: tuple[Any, ...],
        positions: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:  # fmt: skip
        key = (keys, *(id(n) for n in name))
        if key not in self._masks:
            mask = decoder_mask(
                self.backend, hidden.shape[1], keys, valid, hidden.dtype, hidden.device,
                positions, self.window,
            )  # fmt: skip
            self._masks[key] = (name, mask)
        mask = self._masks[key][1]
        return mask if mask is None or mask.device == hidden.device else mask.to(hidden.device)


class PrefillPass:
    """One prefill with images through the decoder."""

    def __init__(
        self,
        calls: LayerCalls,
        stages: tuple[DecoderStage, ...],
        view: SequenceView,
        native: SequenceView,
        cache: DynamicCache | None,
        past: int,
        attention_mask: Tensor | None,
    ) -> None:
        self.calls, self.stages, self.view, self.native = calls, stages, view, native
        self.runs: list[DecoderRun] = [stage.start() for stage in stages]
        self.original_length, self.cache, self.past = native.column.shape[1], cache, past
        self.attention_mask = attention_mask
        #: the language model's own masks and positions are not those of the current sequence
        self.detached = False
        self.views: list[SequenceView] = []
        #: rotary positions that each layer worked with
        self.positions: list[Tensor] = []
        #: input of the attention or MLP module that is running in a layer with transition taps
        self.module_input: Tensor | None = None
        self._shifts: dict[tuple[int, int], tuple[Any, Tensor]] = {}
        self._past_valid: Tensor | None = None
        self._policy_lengths: dict[int, list[int]] = {}

    @property
    def compressed(self) -> bool:
        return self.view is not self.native

    def to(self, device: torch.device) -> None:
        if self.view.column.device != device:
            view = self.view
            for name in ("column", "position", "segment", "after", "tag", "next_position"):
                value = getattr(view, name)
                if value is not None:
                    setattr(view, name, value.to(device))

    # ------------------------------------------------------------------ one layer

    def prepare(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Before a layer: let the runs drop tokens, then announce what the layer is to see."""
        self.to(hidden.device)
        for stage, run in zip(self.stages, self.runs):
            if number in stage.prune_layers:
                scoring = _Scoring(self, number, layer)
                keep = run.before_layer(number, hidden, self.view, scoring)
                if keep is not None:
                    hidden = self._drop(number, run, hidden, keep)
        self.views.append(self.view)
        self.positions.append(self.view.position)
        cached = self._cached(number)
        if self.compressed or isinstance(cached, CompressedLayer):
            self._announce(number, hidden, kwargs)
        return hidden

    def _cached(self, number: int) -> Any:
        if self.cache is None or len(self.cache.layers) <= number:
            return None
        return self.cache.layers[number]

    def _drop(self, number: int, run: DecoderRun, hidden: Tensor, keep: Keep) -> Tensor:
        view = self.view
        counts = keep.counts
        if counts is None:
            most = view.segments
            one_hot = (view.segment[:, :, None] == torch.arange(most, device=hidden.device)) & (
                keep.mask[:, :, None]
            )
            read = one_hot.sum(1).tolist()  # adaptive: the numbers must reach the host
            counts = [row[: len(own)] for row, own in zip(read, view.counts)]
        if counts == view.counts:
            return hidden
        lengths = [
            n - sum(old) + sum(new) for n, old, new in zip(view.lengths, view.counts, counts)
        ]
        longest = max(lengths)
        stays = view.valid & (keep.mask | ~view.visual)
        arange = torch.arange(stays.shape[1], device=hidden.device)
        key = torch.where(stays, arange, torch.full_like(arange, -1))
        index = key.sort(dim=1, stable=True).values[:, key.shape[1] - longest :]
        padded = min(lengths) < longest
        self.view = take(view, index, counts, lengths, padded, keep.positions == "compact")
        self.detached = True
        place = index.clamp(min=0)
        for other in self.runs:
            other.dropped(number, place)
        return hidden.gather(1, place[:, :, None].expand(-1, -1, hidden.shape[2]))

    def _shift(self, past_shift: Tensor | None) -> Tensor | None:
        """[B] original minus layer position of the next token, for layers of this view."""
        key = (id(self.view), id(past_shift))
        if key not in self._shifts:
            here = self.view.next_position
            shift = self.native.next_position.to(here.device) - here
            if past_shift is not None:
                shift = shift + past_shift.to(shift.device)
            self._shifts[key] = ((self.view, past_shift), shift)
        return self._shifts[key][1]

    def _announce(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        view, past_shift, past_valid, entries = self.view, None, None, 0
        past_padded, past_columns = False, None
        if self.cache is not None:
            layer = compressed_layer(self.cache, number)
            entries, past_shift = layer.entries, layer.shift
            if entries:
                past_columns = layer.all_columns()
                past_padded = layer.padded
                if past_padded:
                    past_valid = past_columns >= 0
                elif self.attention_mask is not None and self.past_mask_padded():
                    past_valid = self.attention_mask[:, : self.past] != 0
                    past_valid = past_valid.gather(1, past_columns)
                    past_columns = past_columns.masked_fill(~past_valid, -1)
                    layer.columns, layer.padded, past_padded = past_columns, True, True
            columns = self._columns()
            layer.expect(columns, self.original_length, view.padded, self._shift(past_shift))
        position, embeddings = self.calls.embeddings(hidden, view.position, past_shift)
        self.positions[-1] = position
        window = None
        if self.calls.window is not None:
            window = (position, position)
            if self.cache is not None:
                window = compressed_layer(self.cache, number).window_positions(position)
        if not (self.detached or entries):
            return  # the language model made masks and positions for this very sequence
        valid = None
        if view.padded or past_padded:
            valid = view.valid
            if entries:
                if past_valid is None:
                    past_valid = valid.new_ones(valid.shape[0], entries)
                valid = torch.cat([past_valid.to(valid.device), valid], dim=1)
        kwargs["attention_mask"] = self.calls.mask(
            hidden, entries + hidden.shape[1], valid,
            (view, past_columns if past_padded else None, window and position), window,
        )  # fmt: skip
        kwargs["position_ids"] = position
        kwargs["position_embeddings"] = embeddings

    def _columns(self) -> Tensor:
        """Columns of this view counted from the start of the conversation; one object per view,
        so that decode steps recognise layers that hold the same tokens."""
        if not self.past:
            return self.view.column
        key = (id(self.view), -1)
        if key not in self._shifts:
            column = self.view.column
            self._shifts[key] = (self.view, torch.where(column < 0, -1, column + self.past))
        return self._shifts[key][1]

    def past_mask_padded(self) -> bool:
        """Whether the cached part of the prompt holds padding (read once, later turns only)."""
        if self._past_valid is None:
            assert self.attention_mask is not None
            self._past_valid = (self.attention_mask[:, : self.past] != 0).all().cpu()
        return not bool(self._past_valid)

    # ------------------------------------------------------------------ taps and end

    def attention(self, number: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        view = self.view
        past = k.shape[2] - q.shape[2]
        valid = None
        cached = self._cached(number)
        if isinstance(cached, CompressedLayer) and cached.padded:
            valid = cached.all_columns() >= 0
        elif view.padded or (past and self.attention_mask is not None):
            valid = view.valid
            if past:
                mask = self.attention_mask
                before = (
                    valid.new_ones(valid.shape[0], past) if mask is None else (mask[:, :past] != 0)
                )
                valid = torch.cat([before.to(valid.device), valid], dim=1)
        window = None
        if self.calls.window is not None:
            position = view.position
            if isinstance(cached, CompressedLayer) and cached.positions is not None:
                position = cached.positions.to(q.device)
            elif past:
                before = torch.arange(past, device=q.device).expand(q.shape[0], past)
                position = torch.cat([before, position], dim=1)
            window = (position, self.calls.window)
        attention = Attention(q, k, v, scale, causal=True, valid=valid, past=past, window=window)
        for stage, run in zip(self.stages, self.runs):
            if number in stage.taps:
                run.attention(number, attention, view)

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
            policy = run.after_prefill(self.views)
            if policy is None:
                continue
            self._policy_lengths = policy.lengths
            for number, index in policy.index.items():
                self._keep_entries(number, index, policy)

    def _keep_entries(self, number: int, index: Tensor, policy: CachePolicy) -> None:
        assert self.cache is not None
        view = self.views[number]
        ordinary = not isinstance(self._cached(number), CompressedLayer)
        layer = compressed_layer(self.cache, number)
        assert layer.columns is not None
        # this prefill's entries are the newest; a sliding layer may hold a part of them only
        earlier = layer.entries - view.column.shape[1]
        columns = layer.all_columns()
        if ordinary and self.attention_mask is not None:
            real = self.attention_mask.to(columns.device).gather(1, columns) != 0
            layer.columns = columns.masked_fill(~real, -1)
        if self.calls.window is not None and layer.positions is None:
            before, new = columns[:, : max(earlier, 0)], view.position[:, max(-earlier, 0) :]
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

    def probabilities(self, hidden: Tensor, rows: Tensor, view: SequenceView) -> Tensor:
        attn = self.layer.self_attn
        d = attn.head_dim
        cached = self.prefill._cached(self.number)
        past_shift = getattr(cached, "shift", None)
        _, (cos, sin) = self.prefill.calls.embeddings(hidden, view.position, past_shift)
        x = self.layer.input_layernorm(hidden)
        batch, length = x.shape[:2]
        chosen = x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))
        q = attn.q_proj(chosen).view(batch, rows.shape[1], -1, d).transpose(1, 2)
        k = attn.k_proj(x).view(batch, length, -1, d).transpose(1, 2)
        cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
        pick = rows[:, :, None].expand(-1, -1, d)
        q, k = rotate(q, cos.gather(1, pick), sin.gather(1, pick)), rotate(k, cos, sin)
        past = 0
        allowed = torch.arange(length, device=x.device)[None, None, :] <= rows[:, :, None]
        if view.padded:
            allowed = allowed & view.valid[:, None, :]
        if cached is not None and getattr(cached, "is_initialized", False):
            past = cached.keys.shape[-2]
            k = torch.cat([cached.keys, k], dim=2)
            before = torch.ones(batch, 1, past, dtype=torch.bool, device=x.device)
            if isinstance(cached, CompressedLayer) and cached.padded:
                before = (cached.all_columns() >= 0)[:, None]
            elif self.prefill.attention_mask is not None:
                before = (self.prefill.attention_mask[:, :past] != 0)[:, None].to(x.device)
            allowed = torch.cat([before.expand(-1, rows.shape[1], -1), allowed], dim=2)
        return attention_rows(q, k, attn.scaling, allowed)[..., past:]


class StepPass:
    """A forward without images on a cache that holds compressed layers."""

    def __init__(
        self, calls: LayerCalls, cache: DynamicCache, attention_mask: Tensor | None
    ) -> None:
        self.calls, self.cache, self.attention_mask = calls, cache, attention_mask
        self._new_valid: tuple[Tensor, bool] | None = None

    def prepare(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        cached = self.cache.layers[number] if len(self.cache.layers) > number else None
        if not isinstance(cached, CompressedLayer):
            return hidden
        batch, q = hidden.shape[:2]
        start = cached.get_seq_length()
        new, new_padded = self._new(batch, q, hidden.device)
        padded = cached.padded or new_padded
        valid = columns = None
        if padded:
            arange = torch.arange(start, start + q, device=hidden.device)
            own = arange.expand(batch, q) if new is None else arange.masked_fill(~new, -1)
            columns = torch.cat([cached.all_columns().to(hidden.device), own], dim=1)
            valid = columns >= 0
        position = kwargs["position_ids"]
        if cached.shift is not None:
            position, embeddings = self.calls.embeddings(hidden, position, cached.shift)
            kwargs["position_ids"], kwargs["position_embeddings"] = position, embeddings
        window = None
        if self.calls.window is not None:
            window = cached.window_positions(position.expand(batch, q))
        name = (cached.columns if padded else None, cached if window else None)
        if new_padded:
            assert columns is not None
            cached.expect(columns[:, -q:], q, True, cached.shift)
        else:
            cached.expect_step()
        kwargs["attention_mask"] = self.calls.mask(hidden, cached.entries + q, valid, name, window)
        return hidden

    def _new(self, batch: int, q: int, device: torch.device) -> tuple[Tensor | None, bool]:
        """Validity of the new tokens: a later chat turn of a batch may be padded."""
        if q == 1 or self.attention_mask is None or self.attention_mask.dim() != 2:
            return None, False
        if self._new_valid is None:
            new = self.attention_mask[:, -q:] != 0
            self._new_valid = (new, not bool(new.all()))
        new, padded = self._new_valid
        return (new.to(device), True) if padded else (None, False)
