"""Where the tokens of every image stand, and how much the first layer changes their detail."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    ImageTokens,
    KeepDecision,
    ModelFacts,
    ScoringLayer,
    SequenceView,
)
from tokprune.errors import CompositionError
from tokprune.methods.earlier_caches import CacheCuttingRun, CacheCuttingStage
from tokprune.operators.clse import evolution, spectral

if TYPE_CHECKING:
    from tokprune.methods.clse import CLSE

Window = tuple[int, int, int, int]


@dataclass(frozen=True)
class AlikeImages:
    """Images of a batch whose tiles have the same windows: ``numbers``, in reading order; ``runs``:
    consecutive tiles of one (height, width), as (grid, first cell, cell behind the last);
    ``column`` [k, n]: the prompt column of every cell, −1 where there is none."""

    numbers: list[int]
    runs: tuple[tuple[tuple[int, int], int, int], ...]
    column: Tensor


def whole_grids(images: Sequence[ImageTokens]) -> list[AlikeImages]:
    """Where the tokens of the images stand.

    Raises:
        CompositionError: another method has dropped or merged some of them.
    """
    alike: dict[tuple[tuple[Window, ...], int], list[int]] = {}
    for number, image in enumerate(images):
        if image.count != image.original:
            raise CompositionError(
                f"CLSE's first cut compares whole images, and {image.count} of the "
                f"{image.original} tokens of one have come from another method; with "
                "first_cut='attn' it ranks by attention alone, and works on any"
            )
        alike.setdefault((tuple(image.windows()), image.count), []).append(number)
    return [
        _alike(numbers, [images[n] for n in numbers], windows)
        for (windows, _), numbers in alike.items()
    ]


def _alike(
    numbers: list[int], images: list[ImageTokens], windows: tuple[Window, ...]
) -> AlikeImages:
    sizes = [(bottom - top, right - left) for top, bottom, left, right in windows]
    starts = [0, *itertools.accumulate(height * width for height, width in sizes)]
    runs, first = [], 0
    for grid, own in itertools.groupby(sizes):
        last = first + len(list(own))
        if starts[last] > starts[first]:
            runs.append((grid, starts[first], starts[last]))
        first = last
    tile, row, col, column = (
        torch.stack([getattr(image, name) for image in images])
        for name in ("tile", "row", "col", "column")
    )
    known = [(start, *window) for start, window in zip(starts, windows)]
    of_tile = torch.tensor(known).to(tile.device, non_blocking=True)[tile.clamp(min=0)]
    start, top, bottom, left, right = of_tile.unbind(-1)
    # newlines and the class token stand on no grid: to a spare cell
    inside = (row >= top) & (row < bottom) & (col >= left) & (col < right)
    cell = torch.where(inside, start + (row - top) * (right - left) + col - left, starts[-1])
    places = column.new_full((len(images), starts[-1] + 1), -1).scatter(1, cell, column)
    return AlikeImages(numbers, tuple(runs), places[:, :-1])


class CLSEStage(CacheCuttingStage):
    method: CLSE

    def __init__(self, method: CLSE, facts: ModelFacts) -> None:
        super().__init__(method, facts)
        first = method.steps[0]
        # what enters the layer before the first cut is looked at, too
        self.prune_before = frozenset({*method.steps, first - 1})
        if method.first_cut == "clse":
            self.taps -= {first - 1}

    def start(self) -> CLSERun:
        return CLSERun(self.method, self.cached)


class CLSERun(CacheCuttingRun):
    method: CLSE

    def __init__(self, method: CLSE, cached: frozenset[int]) -> None:
        super().__init__(method, cached)
        #: None: nobody said where the images stand
        self.grids: list[AlikeImages] | None = None
        #: of each group of images, [k, n]: detail of what entered the layer before the first cut
        self.detail: list[Tensor] = []

    def images(self, images: Sequence[ImageTokens]) -> None:
        self.grids = whole_grids(images)

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        first = self.method.steps[0]
        if layer < first:
            if self.counts(first, sequence) != sequence.counts:
                self.detail = self._detail(hidden, sequence)
            return None
        if layer == first and self.detail:
            factor = self._factor(self._detail(hidden, sequence), sequence).to(hidden.device)
            self.score = factor if self.score is None else self.score.to(hidden.device) * factor
        return super().before_layer(layer, hidden, sequence, scoring)

    def _detail(self, hidden: Tensor, sequence: SequenceView) -> list[Tensor]:
        """High spatial frequencies of every image's tokens."""
        if self.grids is None:
            raise ValueError(
                "inputs_embeds: CLSE's first cut filters images on their grids, and embeddings say "
                "nothing of these; pass input_ids and pixel_values instead, or first_cut='attn'"
            )
        found = []
        for own in self.grids:
            place = self._places(own, sequence).to(hidden.device)
            cells = hidden.flatten(0, 1)[place.clamp(min=0)].masked_fill(place[..., None] < 0, 0)
            parts = [
                spectral(cells[:, first:last], grid, self.method.cutoff)
                for grid, first, last in own.runs
            ]
            found.append(torch.cat(parts, dim=1))
        return found

    def _factor(self, after: list[Tensor], sequence: SequenceView) -> Tensor:
        """[B, L] how much the detail has changed; ½ outside the grids."""
        device = sequence.column.device
        factor = torch.full((sequence.column.numel() + 1,), 0.5, device=device)
        for own, old, new in zip(self.grids or [], self.detail, after):
            value = evolution(old.to(new.device), new, self.method.temperature).to(device)
            factor[self._places(own, sequence).to(device).flatten()] = value.flatten()
        return factor[:-1].view_as(sequence.column)

    def _places(self, own: AlikeImages, sequence: SequenceView) -> Tensor:
        """[k, n] places in the flattened batch of the cells, −1 where there is none."""
        rows = [b for b, row in enumerate(sequence.counts) for _ in row]
        length = sequence.column.shape[1]
        start = torch.tensor([rows[number] * length for number in own.numbers])
        start = start.to(own.column.device, non_blocking=True)[:, None]
        return torch.where(own.column < 0, -1, own.column + start)
