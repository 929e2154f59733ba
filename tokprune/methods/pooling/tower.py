"""Pooling of the vision encoder's output, before the projector."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    Positions,
    Reduction,
    TowerInput,
    TowerTokens,
)
from tokprune.methods.tower_rows import behind_class_token
from tokprune.operators.pooling import grid_avg_pool


class EarlyPoolStage(EncoderStage):
    """Averages p×p windows of the patches after encoder layer ``layer``."""

    def __init__(self, window: int, layer: int, positions: Positions) -> None:
        self.window = window
        self.after_layers = frozenset({layer})
        self.positions = positions

    def start(self, tower: TowerInput) -> EncoderRun:
        return EarlyPoolRun(self.window, tower)


class EarlyPoolRun(EncoderRun):
    def __init__(self, window: int, tower: TowerInput) -> None:
        self.window, self.tower = window, tower

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        (height, width), p, first = self.tower.facts.grid, self.window, tokens.first_patch
        cell = torch.arange(height * width, device=hidden.device)
        pooled = Reduction(
            centres((height, width), p, hidden.device).expand(len(hidden), -1),
            grid_avg_pool(hidden[:, first:], window=p, grid=(height, width)),
            window_at(cell // width, cell % width, p, width).expand(len(hidden), -1),
        )
        return behind_class_token(hidden, first, pooled)

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return EncoderOutcome(unpad=False)


def centres(grid: tuple[int, int], p: int, device: torch.device) -> Tensor:
    """Raster cells in the middle (⌊p/2⌋, ⌊p/2⌋) of every window of a grid."""
    y = torch.arange(p // 2, grid[0], p, device=device)
    x = torch.arange(p // 2, grid[1], p, device=device)
    return (y[:, None] * grid[1] + x).flatten()


def window_at(row: Tensor, col: Tensor, p: int, width: int) -> Tensor:
    """The window that a cell of a grid of ``width`` columns lies in."""
    return row // p * (width // p) + col // p
