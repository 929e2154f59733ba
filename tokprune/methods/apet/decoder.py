"""ApET inside the decoder: the visual tokens of every image once more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    DecoderRun,
    DecoderStage,
    KeepDecision,
    ScoringLayer,
    SequenceView,
)
from tokprune.methods.base import resolve_keep
from tokprune.methods.decoder_rows import tokens_of_images

if TYPE_CHECKING:
    from tokprune.methods.apet import ApET


class LayerStage(DecoderStage):
    ahead = frozenset()

    def __init__(self, method: ApET) -> None:
        self.method, self.positions = method, method.new_positions
        self.prune_before = frozenset({method.prune_before})

    def start(self) -> DecoderRun:
        return _LayerRun(self.method)


class _LayerRun(DecoderRun):
    def __init__(self, method: ApET) -> None:
        self.method = method

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        budget = self.method.decoder_keep
        assert budget is not None
        counts = sequence.counts_after(lambda tokens: resolve_keep(budget, tokens) if tokens else 0)
        if counts == sequence.counts:
            return None
        arange = torch.arange(hidden.shape[1], device=hidden.device)
        new, mask = hidden.clone(), torch.ones_like(sequence.visual)
        group = arange.expand_as(sequence.column).clone()
        for (tokens, keep), members in self._alike(counts, sequence).items():
            # the answer is read from a row's last token, which stays by itself where it is one of
            # an image
            row, place = tokens_of_images(sequence, members, tokens, hidden.device)
            whole = torch.zeros_like(place, dtype=torch.bool)
            if not keep:
                mask[row, place], group[row, place] = whole, torch.full_like(place, -1)
                continue
            found = self.method.compress(hidden[row, place], keep, "layer")
            kept = place.gather(1, found.index)
            mask[row, place] = whole.scatter(1, found.index, True)
            group[row, place] = kept.gather(1, found.group)
            new[row, kept] = found.out
        return KeepDecision(mask, counts, self.method.new_positions, new, group, last_stays=True)

    @staticmethod
    def _alike(
        counts: list[list[int]], sequence: SequenceView
    ) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """(row, image) of those that lose tokens, by how many they have and how many stay; without
        the last token of a row that ends in one."""
        alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for row, (own, now) in enumerate(zip(counts, sequence.counts)):
            for image, (keep, tokens) in enumerate(zip(own, now)):
                last = int(sequence.ends_in_image[row] and image + 1 == len(own))
                if keep < tokens:
                    alike.setdefault((tokens - last, keep - last), []).append((row, image))
        return alike
