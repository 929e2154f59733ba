"""M3: nested scales of every tile's grid, each the average of the next finer one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from tokprune.engine.model import ModelFacts
from tokprune.methods.options import AtLeast
from tokprune.methods.pool import Pool
from tokprune.methods.pooling import WindowPooling
from tokprune.methods.registry import register_method
from tokprune.operators.pooling import nested_scales


@register_method
@dataclass(frozen=True)
class M3(WindowPooling):
    """Run a Matryoshka checkpoint at one of its scales: 576, 144, 36, 9 or 1 tokens per tile of a
    24×24 grid, the same for every image of a call. Choosing the scale is the user's part.

    The scales are those that nest: each pools 2×2 tokens of the next finer one (the last 3×3), so
    a coarse set is a function of every finer set. :class:`Pool` does the pooling, and has the
    other windows of the grid as well. On LLaVA-NeXT each tile is pooled, base included; pooled
    crops are stitched, unpadded and given newline tokens at the pooled resolution. Of a video every
    frame is pooled alike, on the grid that the model gives it.

    Args:
        keep: tokens per tile, one of the scales; or such a fraction. Give ``keep`` or ``level``.
        level: number of the scale, 0 = all tokens, counted towards fewer: 4 is a single token.
        official_rounding: take any ``keep`` as the official code does, which pools by
            p = ⌊√(tokens/keep)⌋: 288 of 576 leave 576, 100 leave 144. Windows that do not fill
            the grid are still refused.
        place: pool "after" the projector (the code that made the published numbers) or "before"
            it (the paper's words; only for models without tiles).
        positions: "compact" renumbers the shortened prompt, "preserve" gives each pooled token
            the id of its window's centre.

    Source: Cai et al., "Matryoshka Multimodal Models", ICLR 2025, arXiv 2405.17430. Its published
    numbers need its checkpoints, trained for these scales; on other checkpoints the same pooling
    is the paper's training-free baseline.
    """

    name = "m3"
    source = "official code"
    needs = "nothing (a checkpoint trained for the scales)"
    one_of = ("keep", "level")
    budget_options = frozenset(one_of)

    level: Annotated[int, AtLeast(0)] | None = None
    official_rounding: bool = False

    def pool(self, facts: ModelFacts) -> Pool:
        """The pooling that this scale is on the tiles of a model.

        Raises:
            ValueError: their grid has no such scale; lists what it has.
        """
        window = self.window_for(facts.need_tower(self.name, whole=False).grid)
        return Pool(window=window, place=self.place, positions=self.positions)

    def window_for(self, grid: tuple[int, int]) -> int:
        scales = nested_scales(*grid)
        cells, listed = scales[0], ", ".join(map(str, scales))
        if self.level is not None:
            if self.level >= len(scales):
                raise ValueError(
                    f"level={self.level} should be at most {len(scales) - 1}: the levels of this "
                    f"model's {grid[0]}×{grid[1]} grid are {listed} tokens"
                )
            return math.isqrt(cells // scales[self.level])
        if self.official_rounding:
            window = max(1, int(math.sqrt(cells / self.wanted(cells))))
            return Pool(window=window).window_for(grid)
        scale = self.wanted_of(scales)
        if scale is None:
            raise ValueError(
                f"keep={self.keep} tokens per tile is no nested scale of its {grid[0]}×"
                f"{grid[1]} grid; keep should be one of {listed} (or use the method "
                "'pool', which takes every window that divides the grid)"
            )
        return math.isqrt(cells // scale)
