"""M3: nested scales of every tile's grid, each the average of the next finer one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from tokprune.engine.contracts import ModelFacts, Plan, Positions
from tokprune.methods.base import (
    Budget,
    Method,
    Preset,
    check_choice,
    check_keep,
    register_method,
)
from tokprune.methods.merge_stage import check_one
from tokprune.methods.pool import Pool, pooling_plan
from tokprune.operators.pooling import nested_scales


@register_method
@dataclass(frozen=True)
class M3(Method):
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

    name: ClassVar[str] = "m3"
    stages: ClassVar[tuple[str, ...]] = ("after projector",)
    needs: ClassVar[str] = "nothing (a checkpoint trained for the scales)"
    paper: ClassVar[str] = "arXiv 2405.17430"
    presets: ClassVar[tuple[Preset, ...]] = Pool.presets

    keep: Budget | None = None
    level: int | None = None
    official_rounding: bool = False
    place: Literal["after", "before"] = "after"
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        check_one(keep=self.keep, level=self.level)
        if self.keep is not None:
            check_keep(self.keep)
        whole = isinstance(self.level, int) and not isinstance(self.level, bool)
        if self.level is not None and (not whole or self.level < 0):
            raise ValueError(f"level={self.level!r} should be a whole number, 0 for all tokens")
        check_choice(self.official_rounding, "official_rounding", (True, False))
        check_choice(self.place, "place", ("after", "before"))
        check_choice(self.positions, "positions", ("compact", "preserve"))

    def pool(self, facts: ModelFacts) -> Pool:
        """The pooling that this scale is on the tiles of a model.

        Raises:
            ValueError: their grid has no such scale; lists what it has.
        """
        return self._pool(facts.grid)

    def window_for(self, grid: tuple[int, int]) -> int:
        """The window that this scale is on a grid.

        Raises:
            ValueError: the grid has no such scale; lists what it has.
        """
        return self._pool(grid).window_for(grid)

    def _pool(self, grid: tuple[int, int]) -> Pool:
        scales, cells = nested_scales(*grid), grid[0] * grid[1]
        if self.level is not None:
            if self.level >= len(scales):
                raise ValueError(
                    f"level={self.level} should be at most {len(scales) - 1}: the levels of this "
                    f"model's {grid[0]}×{grid[1]} grid are {_list(scales)} tokens"
                )
            return Pool(scales[self.level], place=self.place, positions=self.positions)
        assert self.keep is not None
        count = self.keep if isinstance(self.keep, int) else self.keep * cells
        if self.official_rounding:
            window = max(1, int(math.sqrt(cells / count)))
            return Pool(window=window, place=self.place, positions=self.positions)
        near = [scale for scale in scales if abs(scale - count) < 1e-6 * scale]
        if not near:
            raise ValueError(
                f"keep={self.keep} tokens per tile is no nested scale of its {grid[0]}×"
                f"{grid[1]} grid; keep should be one of {_list(scales)} (or use the method "
                "'pool', which takes every window that divides the grid)"
            )
        return Pool(near[0], place=self.place, positions=self.positions)

    def plan(self, facts: ModelFacts) -> Plan:
        return pooling_plan(self, facts)


def _list(scales: list[int]) -> str:
    return ", ".join(map(str, scales))
