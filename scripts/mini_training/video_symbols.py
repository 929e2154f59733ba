"""The code of symbols.py for blocks of frames: places are pixels, since objects move by pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mini_training.symbols import Symbols
from mini_training.video_labels import NAMED
from tokprune.eval.benchmarks.mini.world import GRID, PATCH, SIDE

#: waves per side of the finer code of places, beside that of mini
FINE = 8


class VideoSymbols(nn.Module):
    """Vectors of blocks from labels, places and texture; follows ``tokens`` as Symbols does."""

    def __init__(self, tokens: Tensor, seed: int = 11) -> None:
        super().__init__()
        self.mini = Symbols(tokens)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("fine", torch.randn(4, tokens.shape[1], generator=generator) * 0.06)

    def forward(self, label: Tensor, place: Tensor, texture: Tensor) -> Tensor:
        """label [..., NAMED], place [..., 2] in pixels, texture [..., 12] → [..., width]."""
        code = self.mini
        total = texture.to(code.texture.dtype) @ code.texture
        for i, name in enumerate(NAMED):
            total = total + getattr(code, name)[label[..., i]]
        at = (place.float() / PATCH - 0.5).clamp(0, GRID - 1)
        low = at.floor().long().clamp(max=GRID - 2)
        part = (at - low).to(total.dtype)
        for axis, table in enumerate((code.row, code.col)):
            own, share = low[..., axis], part[..., axis, None]
            total = total + table[own] * (1 - share) + table[own + 1] * share
        angle = 2 * math.pi * FINE * place.float() / SIDE
        waves = torch.cat([angle.sin(), angle.cos()], -1).to(total.dtype)
        return total + waves @ self.fine
