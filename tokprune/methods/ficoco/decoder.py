"""FiCoCo-L: merges after decoder layers, by the logits of their attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    DecoderRun,
    DecoderStage,
    KeepDecision,
    ScoringLayer,
    SequenceView,
)
from tokprune.operators.ficoco import (
    compress,
    head_mean,
    most_targets,
    soft_targets,
    text_redundancy,
)
from tokprune.operators.topk import rank

if TYPE_CHECKING:
    from tokprune.methods.ficoco import FiCoCo


class DecoderMerge(DecoderStage):
    """Reads the attention of ``layers`` and merges before the layer after each."""

    ahead = frozenset()

    def __init__(self, method: FiCoCo, layers: tuple[int, ...]) -> None:
        self.method, self.layers = method, layers
        self.positions = method.new_positions
        self.taps = frozenset(layers)
        self.prune_before = frozenset(layer + 1 for layer in layers)

    def start(self) -> DecoderRun:
        return _DecoderRun(self)


class _DecoderRun(DecoderRun):
    def __init__(self, stage: DecoderMerge) -> None:
        self.stage = stage
        #: vectors [B, L, C] whose products are the layer's head-averaged logits, without mask
        self.query: Tensor | None = None
        self.key: Tensor | None = None

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        key = attention.key[:, :, attention.past :]
        self.query, self.key = head_mean(attention.query, key, attention.scaling)

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        method, layers = self.stage.method, self.stage.layers
        step = layers.index(layer - 1)
        counts = sequence.counts_after(
            lambda tokens: method.counts(tokens, len(layers))[step] if tokens else 0
        )
        images = [
            (b, s, now, now - left)
            for b, row in enumerate(zip(sequence.counts, counts))
            for s, (now, left) in enumerate(zip(*row))
            if left < now
        ]
        assert self.query is not None
        assert self.key is not None
        query, key = self.query.to(hidden.device), self.key.to(hidden.device)
        self.query = self.key = None
        if not images:
            return None
        answer = self._merge(images, hidden, query, key, sequence)
        answer.counts = counts
        return answer

    def _merge(
        self, images: list[tuple[int, int, int, int]], hidden: Tensor, query: Tensor, key: Tensor,
        sequence: SequenceView,
    ) -> KeepDecision:  # fmt: skip
        """All images at once, each [n] of its own, padded at the end to the largest."""
        method, device, length = self.stage.method, hidden.device, hidden.shape[1]
        numbers = torch.tensor(images).to(device, non_blocking=True)
        row, segment, now, wanted = numbers.unbind(1)
        own = sequence.segment[row] == segment[:, None]
        place = (~own).to(torch.int8).sort(dim=1, stable=True).indices
        place = place[:, : max(n for _, _, n, _ in images)]
        arange = torch.arange(place.shape[1], device=device)
        valid = arange < now[:, None]
        asks, keys = query[row[:, None], place], key[row[:, None], place]
        text, spoken = self._text(query, sequence)
        paths = text[row] @ keys.mT  # [N, R, n], 0 where there is no text

        among = (asks @ (valid[:, None].to(keys.dtype) @ keys).mT)[:, :, 0]
        score = text_redundancy(among, paths.sum(1) / spoken[row, None], method.gamma)
        score = score.masked_fill(~valid | self._ends(sequence, row, place), -torch.inf)
        order = rank(score)[:, : max(n for *_, n in images)]
        real = torch.arange(order.shape[1], device=device) < wanted[:, None]
        stays = torch.ones_like(valid).scatter(1, order, ~real)
        chosen = order[:, :, None]
        direct = asks.gather(1, chosen.expand(-1, -1, asks.shape[2])) @ keys.mT
        over_text = paths.gather(2, order[:, None].expand(-1, paths.shape[1], -1)).mT @ paths
        most = most_targets(max(n - r for _, _, n, r in images), method.quantile)
        targets, shares = soft_targets(
            method.alpha * direct + (1 - method.alpha) * over_text, valid & stays,
            method.quantile, most,
        )  # fmt: skip
        mixed = compress(hidden[row[:, None], place], order, targets, shares * real[:, :, None])

        holder = arange.expand_as(place)
        target = torch.where(real, targets[:, :, 0], order)
        holder = place.gather(1, holder.scatter(1, order, target))

        def put(base: Tensor, value: Tensor) -> Tensor:
            """``base`` [B, L, …] with ``value`` [N, n, …] at the images' tokens."""
            flat = base.flatten(0, 1)
            flat = torch.cat([flat, torch.zeros_like(flat[:1])])  # the last row takes padding
            flat[(row[:, None] * length + place).masked_fill(~valid, len(flat) - 1)] = value
            return flat[:-1].view_as(base)

        all_places = torch.arange(length, device=device).expand(sequence.segment.shape)
        return KeepDecision(
            put(sequence.visual, stays), None, method.new_positions, hidden=put(hidden, mixed),
            group=put(all_places, holder), last_stays=True,
        )  # fmt: skip

    @staticmethod
    def _text(query: Tensor, sequence: SequenceView) -> tuple[Tensor, Tensor]:
        """Queries [B, R, C] of the text after the last image, 0 where a row has less of it, and
        how many [B] there are, at least 1."""
        rows, real = sequence.text_rows()
        found = query.gather(1, rows[:, :, None].expand(-1, -1, query.shape[2]))
        return found * real[:, :, None], real.sum(1).clamp(min=1)

    @staticmethod
    def _ends(sequence: SequenceView, row: Tensor, place: Tensor) -> Tensor:
        """[N, n] where the answer is read from a visual token, which therefore stays."""
        if not any(sequence.ends_in_image):
            return torch.zeros_like(place, dtype=torch.bool)
        ends = torch.tensor(sequence.ends_in_image).to(place.device, non_blocking=True)
        return ends[row, None] & (place == sequence.last_row()[row])
