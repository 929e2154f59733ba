"""Pool: average the visual tokens over square windows of each tile's grid (M3 without training)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from tokprune.engine.model import ModelFacts
from tokprune.methods.options import AtLeast
from tokprune.methods.pooling import WindowPooling
from tokprune.methods.registry import register_method
from tokprune.operators.pooling import exact_scales


@register_method
@dataclass(frozen=True)
class Pool(WindowPooling):
    """Average the visual tokens over p×p windows that do not overlap.

    On tiled models each tile's projector output is pooled, base included; the pooled crops are
    stitched and unpadded at the pooled resolution, and one newline token ends each pooled row,
    as the model packs full grids (and shrinks nothing: LLaVA-OneVision's interpolation of large
    images is left out). Of a video every frame is pooled alike, on the grid that it has at the
    language-model input, after the model's own pooling; a newline token at its end stays. Where
    tiles and frames have different grids, ``keep`` or ``window`` should fit what is passed. On
    models whose images have grids of their own, windows at the right and lower edge may be smaller,
    and ``keep`` is the most that is left.

    Args:
        keep: tokens per tile, (H/p)·(W/p) for a whole p: 576, 144, 64, 36, 16, 9, 4 or 1 on a
            24×24 grid; or such a fraction. Give ``keep`` or ``window``.
        window: p.
        place: pool "after" the projector (published code) or "before" it (the paper's words;
            cheaper; only for models without tiles).
        positions: "compact" renumbers the shortened prompt, "preserve" gives each pooled token
            the id of its window's centre.

    Source: Cai et al., "Matryoshka Multimodal Models", ICLR 2025, arXiv 2405.17430. The paper
    fine-tunes the model for these token counts; on other checkpoints this is its training-free
    baseline.
    """

    name = "pool"
    needs = "nothing"
    control = True
    one_of = ("keep", "window")
    budget_options = frozenset(one_of)

    window: Annotated[int, AtLeast(1)] | None = None

    def window_of(self, facts: ModelFacts) -> int:
        """p, for the tiles of a model (:meth:`window_for`)."""
        return self.window_for(facts.need_tower(self.name, whole=False).grid)

    def window_fitting(self, grid: tuple[int, int]) -> int:
        height, width = grid
        if self.window is not None:
            return min(self.window, max(grid))
        most = max(1.0, self.wanted(height * width))
        p = 1
        while -(-height // p) * -(-width // p) > most:
            p += 1
        return p

    def window_for(self, grid: tuple[int, int]) -> int:
        height, width = grid
        scales = exact_scales(height, width)
        windows = [math.isqrt(scales[0] // scale) for scale in scales]
        if self.window is not None:
            if self.window not in windows:
                raise ValueError(
                    f"window={self.window} does not divide the {height}×{width} grid of a tile; "
                    f"it should be one of {', '.join(map(str, windows))}"
                )
            return self.window
        scale = self.wanted_of(scales)
        if scale is None:
            raise ValueError(
                f"keep={self.keep} tokens per tile cannot be pooled from its {height}×{width} "
                f"grid; keep should be one of {', '.join(map(str, scales))}"
            )
        return windows[scales.index(scale)]
