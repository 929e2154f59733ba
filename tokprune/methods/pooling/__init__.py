"""Pooling of windows of every tile's grid: what Pool and M3 have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from tokprune.engine.contracts import Plan, Positions
from tokprune.engine.model import ImageLayout, ModelFacts
from tokprune.methods.base import Method, Preset, Source
from tokprune.methods.options import Budget
from tokprune.methods.pooling.prompt import PoolStage
from tokprune.methods.pooling.tower import EarlyPoolStage
from tokprune.methods.tiles import check_one, feature_layer
from tokprune.operators.anyres import stitched_bounds

_M3 = "M3, arXiv 2405.17430: nested scales of the 24×24 grid"
_NEXT = _M3 + "; per tile, 5 tiles, nominal total"
_SCALES = (576, 144, 36, 9, 1)


@dataclass(frozen=True)
class WindowPooling(Method):
    """Averages the visual tokens of every tile, and of every frame, over p×p windows."""

    stages = ("after projector",)
    paper = "arXiv 2405.17430"
    source: ClassVar[Source] = "paper's equations"
    without_tower_rows = "windows of each image's own grid; those at its edges may be smaller"
    presets = (
        *(Preset("llava-1.5", n, {"keep": n}, _M3) for n in _SCALES),
        *(Preset("llava-next", 5 * n, {"keep": n}, _NEXT) for n in _SCALES),
    )

    #: the options of which exactly one says how much stays
    one_of: ClassVar[tuple[str, ...]] = ("keep",)

    keep: Budget | None = None
    place: Literal["after", "before"] = "after"
    positions: Positions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one(self, self.one_of)

    @abstractmethod
    def window_for(self, grid: tuple[int, int]) -> int:
        """p, for a grid.

        Raises:
            ValueError: the grid has no such window; lists what there is.
        """

    def window_fitting(self, grid: tuple[int, int]) -> int:
        """p, for the grid of an image on a model whose images have grids of their own, which no
        window may divide: those at its right and lower edge are then smaller."""
        return self.window_for(grid)

    def wanted(self, cells: int) -> float:
        """Tokens that ``keep`` asks for of a tile."""
        assert self.keep is not None
        return self.keep if isinstance(self.keep, int) else self.keep * cells

    def wanted_of(self, scales: Sequence[int]) -> int | None:
        """The one of the token counts ``scales``, all tokens first, that ``keep`` asks for."""
        count = self.wanted(scales[0])
        return next((scale for scale in scales if abs(scale - count) < 1e-6 * scale), None)

    def fixed_count(self, facts: ModelFacts, layout: ImageLayout) -> int | None:
        tower = facts.tower
        if tower is None:  # windows at the edges may be smaller
            assert layout.token_grid is not None
            grids = layout.token_grid.grids
            windows = [self.window_fitting(grid) for grid in grids]
            pooled = [-(-h // p) * -(-w // p) for (h, w), p in zip(grids, windows)]
            return sum(pooled) + layout.count - layout.patches
        (height, width), p = tower.grid, self.window_for(tower.grid)
        if p == 1:
            return layout.count
        small = height // p, width // p
        left = small[0] * small[1] + int(self.place == "before" and tower.cls_in_features)
        if not tower.tiled:
            return left
        if layout.tile_grid == (0, 0):
            return left + 1
        assert layout.size is not None
        top, bottom, west, east = stitched_bounds(small, layout.tile_grid, layout.size)
        return left + (bottom - top) * (east - west + 1)

    def plan(self, facts: ModelFacts) -> Plan:
        windows: list[int] = []
        problems: list[ValueError] = []
        tower = facts.tower
        if tower is None:  # grids are known image by image
            if self.place == "before":
                facts.need_tower(f"{self.name} with place='before'")
            return Plan(prompt=(PoolStage(self.window_fitting, False, self.new_positions, False),))
        for grid in filter(None, (tower.grid, facts.frame_grid)):
            try:
                windows.append(self.window_for(grid))
            except ValueError as problem:
                problems.append(problem)
        if not windows:
            raise problems[0]
        nothing = not problems and max(windows) == 1
        if self.place == "after":
            stage = PoolStage(self.window_for, tower.tiled, self.new_positions)
            return Plan() if nothing else Plan(prompt=(stage,))
        if tower.tiled:
            raise ValueError(
                "place='before' is not possible on a model with tiles and newline tokens, which "
                "it packs after the projector; use place='after'"
            )
        layer = feature_layer(tower, f"{type(self).__name__} with place='before'")
        early = EarlyPoolStage(self.window_for(tower.grid), layer, self.new_positions)
        return Plan() if nothing else Plan(encoder=(early,))
