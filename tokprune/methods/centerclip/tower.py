"""CenterCLIP inside the vision encoder: still images, every tile a segment of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    Reduction,
    TowerInput,
    TowerTokens,
)
from tokprune.errors import UnsupportedVideoError
from tokprune.methods.tower_rows import behind_class_token
from tokprune.operators.anyres import tile_windows
from tokprune.operators.segments import cluster_means

if TYPE_CHECKING:
    from tokprune.methods.centerclip import CenterCLIP

#: (top, bottom, left, right) of the cells of a tile that show the image, half open
Window = tuple[int, int, int, int]


def window_cells(window: Window, width: int) -> Tensor:
    """Raster cells inside a window of a tile that is ``width`` cells wide: [n] long, ascending."""
    top, bottom, left, right = window
    return (torch.arange(top, bottom)[:, None] * width + torch.arange(left, right)).flatten()


class TowerStage(EncoderStage):
    """Clusters the patches of every tile after encoder layer ``layer``."""

    def __init__(self, method: CenterCLIP, layer: int, budget: int) -> None:
        self.method, self.budget, self.clusterer = method, budget, method.clusterer()
        self.after_layers = frozenset({layer})
        self.order, self.positions = method.order, method.new_positions

    @property
    def reduces_videos(self) -> bool:
        return False  # their clusters are found at the language-model input

    def start(self, tower: TowerInput) -> EncoderRun:
        if tower.has_videos and self.method.place == "encoder":
            raise UnsupportedVideoError(
                "place='encoder' clusters still images; for a video use place='tower' or "
                "'projector' (or tokprune.reduce_frames on a CLIP model)"
            )
        return TowerRun(self, tower)


class TowerRun(EncoderRun):
    def __init__(self, stage: TowerStage, tower: TowerInput) -> None:
        self.stage, self.tower = stage, tower

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        if self.tower.has_videos:
            return None
        first, (height, width) = tokens.first_patch, self.tower.facts.grid
        patches, windows = hidden[:, first:], self._windows(len(hidden))
        whole = all(window == (0, height, 0, width) for window in windows)
        reduction = self._whole(patches) if whole else self._padded(patches, windows)
        return behind_class_token(hidden, first, reduction)

    def _windows(self, tiles: int) -> list[Window]:
        """Of every tile, the cells that show the image."""
        tower, grid = self.tower, self.tower.facts.grid
        if not tower.tile_grids:
            return [(0, grid[0], 0, grid[1])] * tiles
        sizes = tower.sizes or (None,) * len(tower.tile_grids)
        shown = [tile_windows(grid, across, size) for across, size in zip(tower.tile_grids, sizes)]
        return [window for image in shown for window in image]

    def _whole(self, patches: Tensor) -> Reduction:
        found = self.stage.clusterer(patches, self.stage.budget)
        if self.stage.method.aggregate is None:
            return Reduction(found.medoids)
        return Reduction(found.medoids, cluster_means(patches, found), found.assign)

    def _padded(self, patches: Tensor, windows: list[Window]) -> Reduction:
        """Tiles that are padded in different ways keep different numbers."""
        stage, width, device = self.stage, self.tower.facts.grid[1], patches.device
        mean = stage.method.aggregate == "mean"
        alike: dict[Window, list[int]] = {}
        for number, window in enumerate(windows):
            alike.setdefault(window, []).append(number)
        cells = {window: window_cells(window, width) for window in alike}
        counts = [min(stage.budget, len(cells[window])) for window in windows]
        rows = torch.full((len(windows), max(counts)), -1, device=device)
        group = torch.full(patches.shape[:2], -1, device=device)
        merged = patches[:, : max(counts)].clone()
        for window, members in alike.items():
            k = counts[members[0]]
            if k == 0:
                continue
            tile = torch.tensor(members).to(device, non_blocking=True)
            at = cells[window].to(device, non_blocking=True)
            shown = patches[tile[:, None], at]
            found = stage.clusterer(shown, k)
            rows[tile, :k] = at[found.medoids]
            if mean:
                merged[tile, :k] = cluster_means(shown, found)
                group[tile[:, None], at] = found.assign
        ragged = counts if min(counts) < max(counts) else None
        return Reduction(rows, merged, group, ragged) if mean else Reduction(rows, counts=ragged)

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return EncoderOutcome(unpad=False)  # no survivor is on padding
