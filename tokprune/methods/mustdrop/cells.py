"""Stage 1 of MustDrop where the model merges patches after its tower: windows of the cells that
come out of it, at the language-model input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tokprune.engine.contracts import ImageTokens, PromptStage, Selection
from tokprune.methods.cells import check_whole, index_of_cells
from tokprune.operators.windows import WindowMerge, spatial_merge, spatial_merge_fixed

if TYPE_CHECKING:
    from tokprune.methods.mustdrop import MustDrop


class MergeCells(PromptStage):
    """Merges uniform windows of every tile or frame; cells at the right and lower edge that fill no
    window stay."""

    def __init__(self, method: MustDrop) -> None:
        self.method, self.positions = method, method.new_positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return [self._one(image) for image in images]

    def _one(self, image: ImageTokens) -> Selection | None:
        (height, width), (a, b) = image.grid, self.method.window
        down, across = height // a * a, width // b * b
        if not down or not across:
            return None
        check_whole(image, self.method.name)
        place = index_of_cells(image).view(image.tiles, height, width)
        inner = place[:, :down, :across].flatten(1)
        merge = self._merge(image.features[inner], (down, across))
        if min(merge.counts) == inner.shape[1]:
            return None
        whole = torch.ones(height, width, dtype=torch.bool)
        whole[:down, :across] = False
        edge = place[:, whole.to(place.device)]
        index, features = [], []
        group = torch.full((image.count,), -1, device=place.device)
        start = 0
        for tile, count in enumerate(merge.counts):
            own = inner[tile]
            index += [own[merge.rows[tile, :count]], edge[tile]]
            features += [merge.out[tile, :count], image.features[edge[tile]]]
            group[own] = merge.group[tile] + start
            start += count
            group[edge[tile]] = start + torch.arange(edge.shape[1], device=group.device)
            start += edge.shape[1]
        rows, vectors = torch.cat(index), torch.cat(features)
        if self.method.order == "spatial":
            order = rows.argsort()
            new = torch.empty_like(order)
            new[order] = torch.arange(len(order), device=order.device)
            rows, vectors, group = rows[order], vectors[order], new[group]
        return Selection(rows, vectors, group)

    def _merge(self, x: Tensor, grid: tuple[int, int]) -> WindowMerge:
        method = self.method
        window = (method.window[0], method.window[1])
        if method.retained is not None:
            area = window[0] * window[1]
            least = x.shape[1] // area
            retained = min(x.shape[1], max(least, method.retained))
            return spatial_merge_fixed(x, window, retained, False, grid)
        share: Literal["batch"] | Tensor = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return spatial_merge(x, method.threshold, window, False, share, grid)
