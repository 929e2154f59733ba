"""CenterCLIP at the language-model input: segments of a video, tiles of a still image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import ImageTokens, PromptStage, Selection
from tokprune.methods.base import resolve_keep
from tokprune.methods.cells import check_whole, index_of_cells, keep_on_grid
from tokprune.methods.centerclip.tower import window_cells
from tokprune.operators.segments import cluster_means, segment_bounds, segment_budgets

if TYPE_CHECKING:
    from tokprune.methods.centerclip import CenterCLIP


@dataclass(frozen=True)
class Segment:
    """Tokens that are clustered together."""

    #: number of their image
    image: int
    #: where they stand among its tokens [size] long
    tokens: Tensor
    #: how many they are, of how many frames, and how many stay
    size: int
    frames: int
    keep: int


#: clusters of a segment as tokens of its image: medoids [k] long, the medoid of every token [size]
#: long, and means [k, D] where they are wanted
Clusters = tuple[Segment, Tensor, Tensor, Tensor]


class SegmentStage(PromptStage):
    """Videos always, still images only with ``place="projector"`` or without ``budget``.

    Args:
        budget: tokens to keep of each tile of a still image; None: ``keep`` of its own cells.
    """

    def __init__(self, method: CenterCLIP, budget: int | None) -> None:
        self.method, self.budget, self.clusterer = method, budget, method.clusterer()
        self.positions = method.new_positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        alike: dict[tuple[int, int, int], list[Segment]] = {}
        for number, image in enumerate(images):
            segments = self._segments(number, image)
            if any(segment.keep < segment.size for segment in segments):
                for segment in segments:
                    key = (segment.size, segment.frames, segment.keep)
                    alike.setdefault(key, []).append(segment)
        clusters: dict[int, list[Clusters]] = {}
        for (size, frames, keep), segments in alike.items():
            if size:
                features = [images[segment.image].features[segment.tokens] for segment in segments]
                for own in self._cluster(torch.stack(features), segments, keep, frames):
                    clusters.setdefault(own[0].image, []).append(own)
        return [
            self._answer(image, clusters[number]) if number in clusters else None
            for number, image in enumerate(images)
        ]

    def _segments(self, number: int, image: ImageTokens) -> list[Segment]:
        at_input = self.budget is None or self.method.place == "projector"
        if not image.video and not at_input:
            return []
        check_whole(image, self.method.name)
        return self._of_video(number, image) if image.video else self._of_still(number, image)

    def _of_video(self, number: int, image: ImageTokens) -> list[Segment]:
        n = image.grid[0] * image.grid[1]
        keep = resolve_keep(self.method.keep, image.frames * n)
        bounds = segment_bounds(image.frames, min(self.method.segments, image.frames, keep))
        budgets = segment_budgets(keep, [(stop - start) * n for start, stop in bounds])
        place = index_of_cells(image)
        return [
            Segment(number, place[start * n : stop * n], (stop - start) * n, stop - start, own)
            for (start, stop), own in zip(bounds, budgets)
        ]

    def _of_still(self, number: int, image: ImageTokens) -> list[Segment]:
        place = index_of_cells(image)
        segments, start = [], 0
        for (height, width), window in zip(image.tile_grids(), image.windows()):
            cells = window_cells(window, width) + start
            start += height * width
            tokens = place[cells.to(place.device, non_blocking=True)]
            keep = self.budget
            if keep is None:
                keep = resolve_keep(self.method.keep, len(cells))
            keep = min(keep, len(cells))
            segments.append(Segment(number, tokens, len(cells), 1, keep))
        return segments

    def _cluster(
        self, x: Tensor, segments: list[Segment], keep: int, frames: int
    ) -> list[Clusters]:
        """Clusters of segments of one size, ``x`` [S, size, D]."""
        found = self.clusterer(x, keep, frames)
        means = cluster_means(x, found) if self.method.aggregate == "mean" else x[:, :0]
        clusters = []
        for segment, medoids, assign, mean in zip(segments, found.medoids, found.assign, means):
            stay = segment.tokens[medoids]
            clusters.append((segment, stay, stay[assign], mean))
        return clusters

    def _answer(self, image: ImageTokens, clusters: list[Clusters]) -> Selection:
        """Medoids and tokens off the grid (newline, class token), in prompt order."""
        dropped = sum(segment.size - segment.keep for segment, *_ in clusters)
        index = keep_on_grid(image, torch.cat([stay for _, stay, *_ in clusters]), dropped)
        if self.method.aggregate is None:
            return Selection(index, in_order=True)
        features = image.features.clone()
        row_of = torch.full_like(image.column, -1)
        row_of[index] = torch.arange(len(index), device=index.device)
        group = row_of.clone()
        for segment, stay, home, mean in clusters:
            features[stay] = mean
            group[segment.tokens] = row_of[home]
        return Selection(index, features[index], group)
