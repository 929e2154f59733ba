"""One prefill with images through the decoder: scores, drops, and what each layer is to see."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tokprune.engine.cache import CompressedLayer
from tokprune.engine.check import Contracts
from tokprune.engine.contracts import (
    Attention,
    DecoderRun,
    DecoderStage,
    KeepDecision,
    SequenceView,
)
from tokprune.engine.drops import Drop, survivors
from tokprune.engine.layer_calls import LayerCalls
from tokprune.engine.prefill_cache import PrefillCache, real_keys
from tokprune.engine.scoring_layer import LayerAhead


class PrefillPass:
    """The runs of all decoder stages, and the sequence as it is now. ``native``: the prompt before
    anything was dropped."""

    def __init__(
        self,
        calls: LayerCalls,
        stages: tuple[DecoderStage, ...],
        sequence: SequenceView,
        native: SequenceView,
        cache: PrefillCache,
        contracts: Contracts,
    ) -> None:
        self.calls, self.stages, self.sequence, self.native = calls, stages, sequence, native
        self.cache, self.contracts = cache, contracts
        self.runs: list[DecoderRun] = [contracts.run(stage, stage.start()) for stage in stages]
        #: the language model's own masks and positions are not those of the current sequence
        self.detached = False
        #: the sequence of each layer, and the rotary positions that it worked with
        self.sequences: list[SequenceView] = []
        self.positions: list[Tensor] = []
        self.drops: list[Drop] = []

    @property
    def total(self) -> int:
        """Tokens of the conversation up to the end of this forward, before any compression."""
        return self.cache.past + self.native.column.shape[1]

    def to(self, device: torch.device) -> None:
        sequence = self.sequence
        if sequence.column.device != device:
            for name in ("column", "position", "segment", "after", "tag", "next_position"):
                if (value := getattr(sequence, name)) is not None:
                    setattr(sequence, name, value.to(device))

    # ------------------------------------------------------------------ one layer

    def prepare(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Before a layer: let the runs drop tokens, then announce what the layer is to see."""
        self.to(hidden.device)
        for stage, run in zip(self.stages, self.runs):
            if number in stage.prune_before:
                ahead = LayerAhead(self, number, layer)
                keep = run.before_layer(number, hidden, self.sequence, ahead)
                if keep is not None:
                    self.contracts.keep_decision(run, number, keep, hidden, self.sequence)
                    hidden = self._drop(number, hidden, keep)
        self.sequences.append(self.sequence)
        self.positions.append(self.sequence.position)
        cached = self.cache.layer(number)
        if self.sequence is not self.native or isinstance(cached, CompressedLayer):
            self._announce(number, hidden, kwargs)
        return hidden

    def _drop(self, number: int, hidden: Tensor, keep: KeepDecision) -> Tensor:
        shorter = survivors(self.sequence, keep)
        if shorter is None:
            return hidden
        before, (self.sequence, index) = self.sequence, shorter
        self.detached = True
        self.drops.append(Drop(number, before.segment, index, keep.group))
        hidden = hidden if keep.hidden is None else keep.hidden
        place = index.clamp(min=0)
        for run in self.runs:
            run.dropped(number, place)
        return hidden.gather(1, place[:, :, None].expand(-1, -1, hidden.shape[2]))

    def _announce(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        sequence = self.sequence
        entries, past_columns, past_shift = self.cache.announce(number, sequence)
        position, embeddings = self.calls.embeddings(hidden, sequence.position, past_shift)
        self.positions[-1] = position
        window = self.cache.window_positions(number, position)
        if not (self.detached or entries):
            return  # the language model made masks and positions for this very sequence
        kwargs["attention_mask"] = self.calls.mask(
            hidden,
            entries + hidden.shape[1],
            lambda: real_keys(
                None if past_columns is None else past_columns >= 0, entries, sequence
            ),
            (sequence, past_columns, window and position),
            window,
        )
        self.calls.place(kwargs, position, embeddings)

    # ------------------------------------------------------------------ taps and end

    def attention(self, number: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        """Right after the attention of a tapped layer."""
        sequence, position = self.sequence, self.positions[-1]
        past = k.shape[2] - q.shape[2]
        valid, window = self.cache.visible_keys(number, past, sequence, position)
        attention = Attention(
            q, k, v, scale, causal=True, valid=valid, past=past, window=window,
            rotary=lambda: self.calls.embeddings(q, position, None)[1],
        )  # fmt: skip
        for stage, run in zip(self.stages, self.runs):
            if number in stage.taps:
                run.attention(number, attention, sequence)

    def transition(
        self, number: int, name: Literal["attention", "mlp"], before: Tensor, after: Tensor
    ) -> None:
        """After a module of a layer with transition taps."""
        for stage, run in zip(self.stages, self.runs):
            if number in stage.transition_layers:
                run.transition(number, name, before, after, self.sequence)

    def finish(self) -> None:
        """End of the prefill: methods that prune the KV cache do it now."""
        if self.cache.cache is None:
            return
        for stage, run in zip(self.stages, self.runs):
            if stage.has_cache_policy:
                policy = run.after_prefill(self.sequences)
                if policy is not None:
                    self.contracts.cache_policy(run, policy, self.sequences)
                    self.cache.keep(policy, self.sequences)
