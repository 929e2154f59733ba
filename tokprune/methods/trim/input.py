"""TRIM at the language-model input, by the model's own text embeddings; and for videos whose frames
are pooled behind the tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import ImageTokens, PromptStage, Selection
from tokprune.methods.cells import rows_of_tiles
from tokprune.methods.trim.tiles import Alike, Squeezed, squeeze
from tokprune.operators.cdpruner import text_similarity

if TYPE_CHECKING:
    from tokprune.methods.trim import TRIM


class InputStage(PromptStage):
    def __init__(self, method: TRIM, videos_only: bool = False) -> None:
        self.method, self.positions, self.videos_only = method, method.new_positions, videos_only
        self.wants_text = method.relevance == "text"

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        groups: list[Alike] = []
        tiles: list[list[int]] = []  # of every image
        for image in images:
            first, parts = sum(map(len, tiles)), self._parts(image)
            number = sum(len(rows) for rows in parts)
            tiles.append(list(range(first, first + number)))
            if self.method.keep is not None and all(
                self.method.budget(rows.shape[1], number)[0] == rows.shape[1] for rows in parts
            ):
                tiles[-1] = []  # nothing to do
                continue
            similarity = self._similarity(image)
            for rows in parts:
                names = list(range(first, first + len(rows)))
                first += len(rows)
                groups.append(
                    Alike(names, [number] * len(rows), rows, image.features[rows], similarity[rows])
                )
        if not groups:
            return [None] * len(images)
        done = squeeze(self.method, groups)
        return [
            self._selection(image, [done[name] for name in own]) if own else None
            for image, own in zip(images, tiles)
        ]

    def _similarity(self, image: ImageTokens) -> Tensor:
        if self.wants_text:
            assert image.text is not None
            return text_similarity(image.features, image.text)
        assert image.score is not None
        return image.score

    def _parts(self, image: ImageTokens) -> list[Tensor]:
        """Rows [m, n] of the patches of every tile; those with equally many together."""
        if self.videos_only and not image.video:
            return []
        alike: dict[int, list[Tensor]] = {}
        for rows in rows_of_tiles(image):
            alike.setdefault(len(rows), []).append(rows)
        return [torch.stack(rows) for rows in alike.values()]

    @staticmethod
    def _selection(image: ImageTokens, tiles: Sequence[Squeezed]) -> Selection:
        means = [tile for tile in tiles if tile.mean is not None]
        kept = torch.cat([tile.kept for tile in tiles]).sort().values
        index = torch.cat([kept, *(tile.others[-1:] for tile in means)])
        if not means:
            return Selection(kept, in_order=True)
        group = torch.full((image.count,), -1, device=kept.device)
        group[kept] = torch.arange(len(kept), device=kept.device)
        for number, tile in enumerate(means, start=len(kept)):
            group[tile.others] = number
        merged = torch.stack([tile.mean for tile in means if tile.mean is not None])
        return Selection(index, torch.cat([image.features[kept], merged]), group)
