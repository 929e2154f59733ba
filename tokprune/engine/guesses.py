"""Tokens after a prompt that assisted generation guesses, in the same forward.

They may turn out wrong, so nothing is decided by them: stages see the prompt without its guesses,
which stay at its end in every layer.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    KeepDecision,
    ScoringLayer,
    SequenceView,
)
from tokprune.engine.drops import survivors

_PER_TOKEN = ("column", "slot", "segment", "after", "tag", "place", "size")


class Guesses:
    """The last ``count`` tokens of every row of a prefill (0: none)."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._seen: tuple[weakref.ref[SequenceView], SequenceView] | None = None

    def cut(self, values: Tensor, dim: int = 1) -> Tensor:
        """Values of all tokens without those of guesses."""
        return values.narrow(dim, 0, values.shape[dim] - self.count) if self.count else values

    def sequence(self, whole: SequenceView) -> SequenceView:
        """A sequence as stages see it; the same object for the same sequence."""
        if not self.count:
            return whole
        if self._seen is None or self._seen[0]() is not whole:
            self._seen = weakref.ref(whole), self._without(whole)
        return self._seen[1]

    def _without(self, whole: SequenceView) -> SequenceView:
        parts: dict[str, Any] = {}
        for name in _PER_TOKEN:
            value = getattr(whole, name)
            parts[name] = value if value is None else self.cut(value)
        if whole.slot is whole.column:
            parts["slot"] = parts["column"]
        return replace(
            whole, **parts,
            position=self.cut(whole.position, whole.position.dim() - 1),
            lengths=[n - self.count for n in whole.lengths], width=whole.width - self.count,
        )  # fmt: skip

    def survivors(
        self, whole: SequenceView, keep: KeepDecision, native: SequenceView
    ) -> tuple[SequenceView, Tensor] | None:
        """As :func:`~tokprune.engine.drops.survivors`, by a decision on what stages see."""
        if not self.count:
            return survivors(whole, keep, native)
        shorter = survivors(self.sequence(whole), keep, self._without(native))
        if shorter is None:
            return None
        left, index = shorter
        length = whole.column.shape[1]
        ends = torch.arange(length - self.count, length, device=index.device)
        index = torch.cat([index, ends.expand(len(index), -1)], dim=1)
        return self._with(left, whole, native), index

    def _with(self, left: SequenceView, whole: SequenceView, native: SequenceView) -> SequenceView:
        """What is left of ``whole``, and the guesses behind it."""
        parts: dict[str, Any] = {}
        for name in _PER_TOKEN:
            own, before = getattr(left, name), getattr(whole, name)
            if name == "place" and own is not None:
                before = whole.slot
                if left.place_shift is not None:
                    before = before - left.place_shift[:, None]
            parts[name] = None if own is None else self._joined(own, before)
        if left.slot is left.column:
            parts["slot"] = parts["column"]
        own = native.position.to(left.position.device)
        if left.shift is not None:
            own = own - left.shift[:, None]
        return replace(
            left, **parts, position=self._joined(left.position, own),
            lengths=[n + self.count for n in left.lengths], width=whole.width,
        )  # fmt: skip

    def _joined(self, values: Tensor, whole: Tensor) -> Tensor:
        """Values [.., n] of what is left, and those [.., L] of the guesses behind them."""
        return torch.cat([values, whole[..., whole.shape[-1] - self.count :]], dim=-1)

    def hidden(self, values: Tensor, whole: Tensor) -> Tensor:
        """Hidden states [B, n, D] of what stages see, with those [B, L, D] of the guesses."""
        return torch.cat([values, whole[:, whole.shape[1] - self.count :]], dim=1)

    def attention(self, whole: Attention) -> Attention:
        """An attention call as stages see it."""
        if not self.count:
            return whole
        mask, rotary = whole.mask, whole.rotary
        if mask is not None:
            mask = self.cut(mask, mask.dim() - 1)
            mask = self.cut(mask, 2) if mask.dim() == 4 else mask
        return Attention(
            self.cut(whole.query, 2), self.cut(whole.key, 2), self.cut(whole.value, 2),
            whole.scaling, causal=whole.causal, mask=mask, past=whole.past, window=whole.window,
            softcap=whole.softcap, bias=self._bias(whole.bias),
            rotary=None if rotary is None else lambda: tuple(self.cut(t) for t in rotary()),  # type: ignore[arg-type,return-value]
        )  # fmt: skip

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        bias = self.cut(bias, bias.dim() - 1)
        return self.cut(bias, 2) if bias.dim() == 4 else bias

    def scoring(self, layer: ScoringLayer, hidden: Tensor) -> ScoringLayer:
        """The layer ahead of ``hidden`` [B, L, D], for what stages see of it."""
        return _Scoring(self, layer, hidden) if self.count else layer


class _Scoring(ScoringLayer):
    def __init__(self, guesses: Guesses, layer: ScoringLayer, hidden: Tensor) -> None:
        self.guesses, self.layer, self.whole = guesses, layer, hidden

    def attention(self, hidden: Tensor, sequence: SequenceView) -> Attention:
        whole = self.guesses.hidden(hidden, self.whole)
        return self.guesses.attention(self.layer.attention(whole, sequence))

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.layer.final_norm(hidden)
