"""MMTok's stages: what the encoder makes of every patch, and the selection behind the projector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokprune.engine.contracts import (
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
from tokprune.methods.cells import rows_of_tiles
from tokprune.methods.mmtok.words import QuestionWords
from tokprune.operators.mmtok import multimodal_coverage, square_padding
from tokprune.operators.pooling import share

if TYPE_CHECKING:
    from tokprune.methods.mmtok import MMTok


class Features(EncoderStage):
    """Hands on the output of an encoder layer, which it leaves as it is."""

    reduces = False

    def __init__(self, layer: int, packs: bool) -> None:
        self.after_layers, self.packs = frozenset({layer}), packs

    def start(self, tower: TowerInput) -> EncoderRun:
        return _FeaturesRun()


class _FeaturesRun(EncoderRun):
    def __init__(self) -> None:
        self.outcome = EncoderOutcome()

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> None:
        self.outcome = EncoderOutcome(metric=hidden[:, tokens.first_patch :])

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        metric = self.outcome.metric
        whole = metric is not None and metric.shape[1] == tokens.rows - tokens.first_patch
        return self.outcome if whole else EncoderOutcome()


@dataclass(frozen=True, eq=False)
class _Part:
    """Tokens of one image that compete for a budget of their own."""

    image: int
    rows: Tensor
    keep: int
    excluded: Tensor | None


class CoverageStage(PromptStage):
    def __init__(self, method: MMTok) -> None:
        self.method, self.positions = method, method.new_positions
        self.wants_text = isinstance(method.text, str)

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        method = self.method
        padded = method.padding_of(len(images))
        texts = self._texts(images)
        chosen: dict[int, list[Tensor]] = {}
        alike: dict[tuple[int, bool], list[_Part]] = {}
        for i, image in enumerate(images):
            keep = resolve_keep(method.keep, image.patches)
            if keep == image.patches:
                continue
            chosen[i] = []
            rows = rows_of_tiles(image) if method.scope == "tile" else [image.patch_rows()]
            gone = self._padding(image, padded[i])
            for own, k in zip(rows, share(keep, [len(own) for own in rows])):
                if k == len(own):
                    chosen[i].append(own)
                elif k := min(k, len(own) - (0 if gone is None else len(gone))):
                    like = len(own), image.metric is None
                    alike.setdefault(like, []).append(_Part(i, own, k, gone))
        for parts in alike.values():
            order = self._order(images, texts, parts)
            for part, picks in zip(parts, order):
                chosen[part.image].append(part.rows[picks[: part.keep]])
        answers: list[Selection | None] = [None] * len(images)
        for i, kept in chosen.items():
            answers[i] = Selection(torch.cat(kept).sort().values, in_order=True)
        return answers

    def _texts(self, images: Sequence[ImageTokens]) -> list[Tensor]:
        """[m, D] words of every image."""
        if isinstance(self.method.text, QuestionWords):
            return self.method.text.of_images(len(images))
        return [image.features[:0] if image.text is None else image.text for image in images]

    def _order(
        self, images: Sequence[ImageTokens], texts: Sequence[Tensor], parts: Sequence[_Part]
    ) -> Tensor:
        """Of parts with equally many tokens the picks, [parts, most]; those of a part at its
        start."""
        method, device = self.method, parts[0].rows.device
        vision = torch.stack([images[part.image].features[part.rows] for part in parts])
        metrics = [images[part.image].metric for part in parts]
        features = vision
        if method.similarity == "encoder" and metrics[0] is not None:
            known = zip(metrics, parts)
            features = torch.stack([own[part.rows] for own, part in known if own is not None])
        own = [texts[part.image].to(device) for part in parts]
        text = pad_sequence(own, batch_first=True)
        lengths = torch.tensor([len(words) for words in own])[:, None]
        words = torch.arange(text.shape[1])[None] < lengths
        excluded = None
        if any(part.excluded is not None for part in parts):
            excluded = torch.zeros(vision.shape[:2], dtype=torch.bool)
            for number, part in enumerate(parts):
                if part.excluded is not None:
                    excluded[number, part.excluded] = True
            excluded = excluded.to(device, non_blocking=True)
        return multimodal_coverage(
            text, vision, features, max(part.keep for part in parts), method.alpha,
            method.text_temperature, method.image_temperature,
            words.to(device, non_blocking=True), excluded,
        )  # fmt: skip

    def _padding(self, image: ImageTokens, size: tuple[int, int] | None) -> Tensor | None:
        """Patches of padding (CPU) of an image that is one square tile."""
        height, width = image.grid
        whole = image.tiles == 1 and not image.video and image.count == image.original
        if size is None or not whole or height != width or image.patches != height * width:
            return None
        patch = self.method.patch
        return square_padding(*size, side=height * patch, patch=patch)
