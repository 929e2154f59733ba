"""Stages of methods that choose patches of every tile: what they see of the encoder, what goes.

:class:`~tokprune.methods.tile_selector.TileChooser` is the method behind them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    PromptStage,
    Reduction,
    Selection,
    TowerInput,
    TowerTokens,
)
from tokprune.engine.model import TowerFacts
from tokprune.methods.cells import check_whole, index_of_cells
from tokprune.methods.tiles import feature_layer
from tokprune.methods.tower_rows import (
    Window,
    behind_class_token,
    cells_of,
    check_equal_rows,
    shown_windows,
    stitched_key,
)

if TYPE_CHECKING:
    from tokprune.methods.tile_selector import TileChooser


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles of equally many patches, to choose from."""

    #: [B, N, D], any float dtype: what the tower's layer that the model reads gives, before the
    #: projector; where patches are merged after it, the tokens that enter the language model
    features: Tensor
    #: [layers, B, N] float32: what :meth:`TileSelector.look` made of the layers looked at
    scores: Tensor
    #: (height, width) of a tile
    grid: tuple[int, int]
    #: [B, N] long, the cell of each patch on the tile's grid, in raster order
    cells: Tensor

    @property
    def score(self) -> Tensor:
        """Of the last layer looked at, [B, N]."""
        return self.scores[-1]

    def part(self, at: Tensor, window: Window | None) -> tuple[Tiles, Tensor | None]:
        """Some tiles [b], of each the patches in a window (None: all), and which [n] these are."""
        own = self
        if len(at) < len(self.cells):
            own = Tiles(self.features[at], self.scores[:, at], self.grid, self.cells[at])
        if window is None:
            return own, None
        seen = cells_of(window, self.grid[1]).to(self.cells.device, non_blocking=True)
        features, scores = own.features[:, seen], own.scores[:, :, seen]
        return Tiles(features, scores, self.grid, own.cells[:, seen]), seen


# ------------------------------------------------------------------------ in the encoder


class _Looking(EncoderRun):
    """Sees the layers."""

    def __init__(self, method: TileChooser) -> None:
        self.method = method
        self.seen: dict[int, tuple[Tensor, TowerTokens]] = {}

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        self.seen[layer] = self.method.look(attention, tokens), tokens

    def scores(self, tokens: TowerTokens) -> Tensor:
        """[layers, B, T] at the patches of now."""
        return torch.stack([tokens.carry(*self.seen[layer]) for layer in sorted(self.seen)])


class Observer(EncoderStage):
    """Looks at a tower whose rows do not change."""

    def __init__(self, method: TileChooser, tower: TowerFacts) -> None:
        self.method, self.taps = method, frozenset(method.layers(tower))

    @property
    def share_key(self) -> Hashable:
        look = type(self.method).look
        score = getattr(self.method, "score", None)
        return look.__module__, look.__qualname__, score, *sorted(self.taps)

    def start(self, tower: TowerInput) -> EncoderRun:
        return _Observing(self.method)


class _Observing(_Looking):
    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return EncoderOutcome(metric=self.scores(tokens).permute(1, 2, 0))


class InTower(EncoderStage):
    """Drops patches behind the layer that the model reads; of videos whose frames are pooled after
    it, it only looks at them."""

    def __init__(self, method: TileChooser, tower: TowerFacts, pooled_videos: bool) -> None:
        self.method, self.taps = method, frozenset(method.layers(tower))
        self.pooled_videos = pooled_videos
        self.after_layers = frozenset({feature_layer(tower, method.name)})
        self.order, self.positions = method.order, method.new_positions

    @property
    def reduces_videos(self) -> bool:
        return not self.pooled_videos

    def start(self, tower: TowerInput) -> EncoderRun:
        if self.pooled_videos and tower.has_videos:
            return _Observing(self.method)
        return _Dropping(self.method, tower)


class _Dropping(_Looking):
    def __init__(self, method: TileChooser, tower: TowerInput) -> None:
        super().__init__(method)
        self.tower = tower
        #: patches of padding are known to be none of those kept
        self.no_padding = False

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        facts, tower = self.tower.facts, self.tower
        check_equal_rows(tokens, self.method.name)
        first = tokens.first_patch
        patches, cells = hidden[:, first:], tokens.slots[:, first:]
        counts = self.method.counts(patches.shape[1], tower.tiles_per_image)
        if min(counts) == patches.shape[1]:
            return None
        windows: list[Window | None] = [None] * len(counts)
        if facts.tiled and self.method.order == "spatial" and patches.shape[1] == facts.patches:
            windows, self.no_padding = shown_windows(tower), True
            counts = [min(n, _size(window, n)) for n, window in zip(counts, windows)]
        tiles = Tiles(patches, self.scores(tokens), facts.grid, cells)
        index = self.method.chosen(tiles, counts, windows)
        ragged = counts if min(counts) < max(counts) else None
        return behind_class_token(hidden, first, Reduction(index, counts=ragged))

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        unpad = self.method.order == "spatial" and not self.no_padding
        if not self.tower.facts.tiled:
            return EncoderOutcome(unpad=False)
        return EncoderOutcome(key=self._key(tokens), unpad=unpad)

    def _key(self, tokens: TowerTokens) -> Tensor:
        """Sort keys: the base tile, the stitched crops, their class tokens where there are any."""
        facts = self.tower.facts
        key = stitched_key(tokens.slots[:, tokens.first_patch :], self.tower)
        last = 2 * facts.max_tiles * facts.patches
        return pad(key, (1, 0), value=last) if facts.cls_in_features else key


def _size(window: Window | None, n: int) -> int:
    return n if window is None else (window[1] - window[0]) * (window[3] - window[2])


# ------------------------------------------------------------------ language-model input


class AtInput(PromptStage):
    """Drops tokens of models that merge patches behind their tower, and merges them to anchors."""

    def __init__(self, method: TileChooser, videos_only: bool = False) -> None:
        self.method, self.positions, self.videos_only = method, method.new_positions, videos_only

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return [self._one(image) for image in images]

    def _one(self, image: ImageTokens) -> Selection | None:
        if self.videos_only and not image.video:
            return None
        anchors, grids = self.method.anchors, image.tile_grids()
        sizes = [height * width for height, width in grids]
        counts = [self.method.counts(size, [len(grids)])[0] for size in sizes]
        if counts == sizes:
            return None
        check_whole(image, self.method.name)
        windows: list[Window | None] = [None] * len(grids)
        if sum(sizes) > image.patches:  # the model crops its tiles
            windows = list(image.windows())
            counts = [min(n, _size(window, n)) for n, window in zip(counts, windows)]
        budget = sum(counts)
        if budget == image.patches:
            return None
        if anchors is not None:
            counts = [anchors.chosen(count) for count in counts]
        stay = self._chosen(image, grids, counts, windows)
        if anchors is not None:
            return anchors.merged(image, stay, budget - stay.shape[0], newlines=False)
        return Selection(stay.sort().values, in_order=True)

    def _chosen(
        self, image: ImageTokens, grids: Sequence[tuple[int, int]], counts: Sequence[int],
        windows: Sequence[Window | None],
    ) -> Tensor:  # fmt: skip
        """Tokens that stay [k], so many of every tile, of those that its window shows."""
        places = index_of_cells(image).split([height * width for height, width in grids])
        alike: dict[tuple[int, int], list[int]] = {}
        for tile, grid in enumerate(grids):
            if counts[tile]:
                alike.setdefault(grid, []).append(tile)
        stay = [places[0][:0]]
        for grid, members in alike.items():
            place = torch.stack([places[tile] for tile in members])
            cells = torch.arange(place.shape[1], device=place.device).expand_as(place)
            scores = torch.empty(0, *place.shape, device=place.device)  # nothing was looked at
            at = place.clamp(min=0)
            if image.metric is not None:
                scores = image.metric[at].permute(2, 0, 1)
            tiles = Tiles(image.features[at], scores, grid, cells)
            own = [counts[tile] for tile in members]
            index = self.method.chosen(tiles, own, [windows[tile] for tile in members])
            stay += [place[row, index[row, :count]] for row, count in enumerate(own)]
        return torch.cat(stay)
