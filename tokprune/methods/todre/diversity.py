"""Stage 1 of ToDRE, at the language-model input: a diverse subset, from a pivot on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    PromptStage,
    Selection,
    TowerInput,
    TowerTokens,
)
from tokprune.methods.base import resolve_keep
from tokprune.methods.centring import centred
from tokprune.methods.options import Budget
from tokprune.operators.diversity import (
    center_pivot,
    cls_pivot,
    cls_scores,
    farthest_pivot,
    k_center,
    max_sum,
    random_pivot,
)

if TYPE_CHECKING:
    from tokprune.methods.todre import ToDRE


class ClassAttention(EncoderStage):
    """Observes the class token's attention in the last layer of the tower."""

    def __init__(self, layer: int) -> None:
        self.taps = frozenset({layer})

    @property
    def share_key(self) -> Hashable:
        return "class attention", *self.taps

    def start(self, tower: TowerInput) -> EncoderRun:
        return _ClassAttentionRun()


class _ClassAttentionRun(EncoderRun):
    def __init__(self) -> None:
        self.score: Tensor | None = None
        self.tokens: TowerTokens | None = None

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        self.score, self.tokens = cls_scores(attention.cls_row()), tokens

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        score, seen = self.score, self.tokens
        if score is not None and seen is not None:
            # another method reduced this very layer after its attention: follow its rows
            score = tokens.carry(score, seen)
        return EncoderOutcome(score=score)


class DiversityStage(PromptStage):
    def __init__(self, method: ToDRE, keep: Budget) -> None:
        self.method, self.keep, self.positions = method, keep, method.new_positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        orders = self.order(images)
        return [
            None if order is None else Selection(order.sort().values, in_order=True)
            for order in orders
        ]

    def order(self, images: Sequence[ImageTokens]) -> list[Tensor | None]:
        """Rows of each image in selection order, the pivot first; None: nothing to drop.

        Images with equally many patches are selected together.
        """
        orders: list[Tensor | None] = [None] * len(images)
        alike: dict[int, list[int]] = {}
        for i, image in enumerate(images):
            if resolve_keep(self.keep, image.patches) < image.patches:
                alike.setdefault(image.patches, []).append(i)
        for n, members in alike.items():
            k = resolve_keep(self.keep, n)
            chosen = [images[i] for i in members]
            patches = torch.stack([image.patch_rows() for image in chosen])
            x = torch.stack([image.features[rows] for image, rows in zip(chosen, patches)])
            pivot = self._pivot(chosen, patches, x)
            x, weight = centred(x, self.method.centre)
            if self.method.select == "max_sum":
                order = patches.gather(1, max_sum(x, k, pivot))
            else:
                order = patches.gather(1, k_center(x, k, pivot, weight=weight))
            for i, own in zip(members, order):
                orders[i] = own
        return orders

    def _pivot(self, images: list[ImageTokens], patches: Tensor, x: Tensor) -> Tensor:
        """First token of each image, [B], as a column of ``patches`` [B, n]."""
        rule = self.method.pivot
        if rule == "center":
            return center_pivot(x)
        if rule == "random":  # drawn on the host, so every device draws the same
            one = random_pivot(x.shape[1], torch.Generator().manual_seed(self.method.seed))
            return one.to(x.device).expand(x.shape[0])
        scores = [image.score for image in images if image.score is not None]
        if rule == "farthest" or len(scores) < len(images):
            return farthest_pivot(x)
        score = torch.stack([s[rows] for s, rows in zip(scores, patches)])
        # the base tile of an image, all frames of a video
        base = torch.stack(
            [(image.tile[rows] == 0) | image.video for image, rows in zip(images, patches)]
        )
        return cls_pivot(score, base)
