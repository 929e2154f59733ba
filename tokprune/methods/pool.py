"""Pool: average the visual tokens over square windows of each tile's grid (M3 without training)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    ModelFacts,
    Plan,
    Positions,
    PromptStage,
    Reduction,
    Selection,
    TowerInput,
    TowerTokens,
)
from tokprune.methods.base import (
    Budget,
    Method,
    Preset,
    check_choice,
    check_keep,
    register_method,
)
from tokprune.methods.grid import index_of_cells
from tokprune.methods.merge_stage import check_one, last_merging_layer
from tokprune.operators.anyres import stitched_bounds
from tokprune.operators.pooling import exact_scales, grid_avg_pool

_M3 = "M3, arXiv 2405.17430: nested scales of the 24×24 grid"


@register_method
@dataclass(frozen=True)
class Pool(Method):
    """Average the visual tokens over p×p windows that do not overlap.

    On tiled models each tile's projector output is pooled, base included; the pooled crops are
    stitched and unpadded at the pooled resolution, and one newline token ends each pooled row,
    as the model packs full grids (and shrinks nothing: LLaVA-OneVision's interpolation of large
    pictures is left out). Of a video every frame is pooled alike, on the grid that it has at the
    language-model input, after the model's own pooling; a newline token at its end stays. Where
    tiles and frames have different grids, ``keep`` or ``window`` should fit what is passed.

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

    name: ClassVar[str] = "pool"
    stages: ClassVar[tuple[str, ...]] = ("after projector",)
    needs: ClassVar[str] = "nothing"
    paper: ClassVar[str] = "arXiv 2405.17430"
    presets: ClassVar[tuple[Preset, ...]] = (
        *(Preset("llava-1.5", n, {"keep": n}, _M3) for n in (576, 144, 36, 9, 1)),
        *(
            Preset("llava-next", 5 * n, {"keep": n}, _M3 + "; per tile, 5 tiles, nominal total")
            for n in (576, 144, 36, 9, 1)
        ),
    )

    keep: Budget | None = None
    window: int | None = None
    place: Literal["after", "before"] = "after"
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        check_one(keep=self.keep, window=self.window)
        if self.keep is not None:
            check_keep(self.keep)
        whole = isinstance(self.window, int) and not isinstance(self.window, bool)
        if self.window is not None and (not whole or self.window < 1):
            raise ValueError(
                f"window={self.window!r} should be a whole number of cells, at least 1"
            )
        check_choice(self.place, "place", ("after", "before"))
        check_choice(self.positions, "positions", ("compact", "preserve"))

    def window_of(self, facts: ModelFacts) -> int:
        """p, for the tiles of a model (:meth:`window_for`)."""
        return self.window_for(facts.grid)

    def window_for(self, grid: tuple[int, int]) -> int:
        """p, for a grid.

        Raises:
            ValueError: no whole window gives that many tokens; lists what there is.
        """
        height, width = grid
        scales = exact_scales(height, width)
        windows = [p for p in range(1, min(grid) + 1) if height % p == 0 and width % p == 0]
        if self.window is not None:
            if self.window not in windows:
                raise ValueError(
                    f"window={self.window} does not divide the {height}×{width} grid of a tile; "
                    f"it should be one of {', '.join(map(str, windows))}"
                )
            return self.window
        assert self.keep is not None
        count = self.keep if isinstance(self.keep, int) else self.keep * height * width
        near = [p for p, scale in zip(windows, scales) if abs(scale - count) < 1e-6 * scale]
        if not near:
            raise ValueError(
                f"keep={self.keep} tokens per tile cannot be pooled from its {height}×{width} "
                f"grid; keep should be one of {', '.join(map(str, scales))}"
            )
        return near[0]

    def plan(self, facts: ModelFacts) -> Plan:
        return pooling_plan(self, facts)


def pooling_plan(method: Any, facts: ModelFacts) -> Plan:
    """The plan of a method that pools windows: :class:`Pool`, M3.

    Raises:
        ValueError: no grid of the model has such windows, or ``place`` does not fit.
    """
    grids = [facts.grid] if facts.frame_grid is None else [facts.grid, facts.frame_grid]
    windows: list[int] = []
    problems: list[ValueError] = []
    for grid in grids:
        try:
            windows.append(method.window_for(grid))
        except ValueError as problem:
            problems.append(problem)
    if not windows:
        raise problems[0]
    nothing = not problems and max(windows) == 1
    if method.place == "after":
        return Plan() if nothing else Plan(prompt=(_PoolStage(method, facts),))
    if facts.tiled:
        raise ValueError(
            "place='before' is not possible on a model with tiles and newline tokens, which "
            "it packs after the projector; use place='after'"
        )
    layer = last_merging_layer(facts, f"{type(method).__name__} with place='before'")
    stage = _EarlyPoolStage(method.window_for(facts.grid), layer, method.positions)
    return Plan() if nothing else Plan(encoder=(stage,))


class _PoolStage(PromptStage):
    #: the engine keeps the projector output of every tile
    wants_raw = True

    def __init__(self, method: Any, facts: ModelFacts) -> None:
        self.method, self.tiled, self.positions = method, facts.tiled, method.positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return [self._video(i) if i.video else self._one(i) for i in images]

    def _video(self, image: ImageTokens) -> Selection | None:
        """Every frame, from the tokens at the language-model input; newline tokens stay."""
        p, (height, width), frames = self.method.window_for(image.grid), image.grid, image.frames
        if p == 1:
            return None
        n, small = height * width, height // p * (width // p)
        index = index_of_cells(image)
        pooled = grid_avg_pool(
            image.features[index].unflatten(0, (frames, n)), window=p, grid=image.grid
        )
        centres = index.view(frames, n)[:, _centres(image.grid, p, index.device)]
        ends = image.count - frames * n
        last = torch.arange(image.count - ends, image.count, device=index.device)
        into = image.tile * small + image.row // p * (width // p) + image.col // p
        line = frames * small + image.newline.cumsum(0) - 1
        return Selection(
            torch.cat([centres.flatten(), last]),
            torch.cat([pooled.flatten(0, 1).to(image.features.dtype), image.features[last]]),
            torch.where(image.newline, line, into),
        )

    def _one(self, image: ImageTokens) -> Selection | None:
        p = self.method.window_for(image.grid)
        if p == 1:
            return None
        if image.raw is None:
            raise ValueError(
                "pool needs the whole grid of every tile, and an earlier method has already "
                "dropped or merged patches; leave one of them out"
            )
        patches = image.raw[:, -image.grid[0] * image.grid[1] :]  # without a class token
        pooled = grid_avg_pool(patches, window=p, grid=image.grid)
        pooled = pooled.to(image.features.device, image.features.dtype)
        index, newlines = index_of_cells(image), _newlines(image)
        base, taken, into = pooled[0], [], []
        height, width = image.grid[0] // p, image.grid[1] // p
        group = torch.where(
            (image.tile == 0) & (image.row >= 0), image.row // p * width + image.col // p, -1
        )
        taken.append(base)
        into.append(index[_centres(image.grid, p, index.device)])
        if len(pooled) > 1:
            features, places, crops = self._crops(image, p, pooled[1:], index, newlines)
            taken.append(features)
            into.append(places)
            group = torch.where(crops < 0, group, crops + height * width)
        elif self.tiled:
            assert image.newline_feature is not None
            taken.append(image.newline_feature[None].to(base))
            into.append(newlines[:1])
            group = torch.where(image.newline, height * width, group)
        return Selection(torch.cat(into).clamp(min=0), torch.cat(taken), group)

    def _crops(
        self, image: ImageTokens, p: int, pooled: Tensor, index: Tensor, newlines: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stitched, unpadded pooled crops with newlines: their features, the image token that
        stands for each, and the one among them that holds each image token (or −1)."""
        assert image.size is not None
        assert image.newline_feature is not None
        (height, width), device = image.grid, index.device
        (down, across), small = image.tile_grid, (height // p, width // p)
        top, bottom, left, right = stitched_bounds(small, image.tile_grid, image.size)
        first, last, west, east = stitched_bounds(image.grid, image.tile_grid, image.size)
        rows, columns = bottom - top, right - left

        grid = pooled.unflatten(0, (down, across)).unflatten(2, small)
        grid = grid.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)[top:bottom, left:right]
        newline = image.newline_feature.to(grid).expand(rows, 1, -1)
        features = torch.cat([grid, newline], dim=1).flatten(0, 1)

        # Where unpadding at full resolution cut the window's centre off, the nearest cell left.
        y = torch.arange(top, bottom, device=device) * p + p // 2
        x = torch.arange(left, right, device=device) * p + p // 2
        y, x = y.clamp(first, max(first, last - 1)), x.clamp(west, max(west, east - 1))
        if image.grids is None:
            tile = (y // height * across)[:, None] + x // width + 1
            cell = (tile * height + (y % height)[:, None]) * width + x % width
            row = y - first
        else:  # the model's own tokens stand on a smaller map
            lines, wide = image.grids[1]
            row = (y - first) * lines // max(1, last - first)
            column = (x - west) * wide // max(1, east - west)
            cell = height * width + row[:, None] * wide + column
        line = newlines[row.clamp(max=max(0, last - first - 1))]
        places = torch.cat([index[cell], line[:, None]], dim=1).flatten()

        crop = (image.tile - 1).clamp(min=0)
        rank = image.newline.cumsum(0) - 1
        if image.grids is None:
            own_y = torch.where(image.newline, rank + first, crop // across * height + image.row)
            own_x = crop % across * width + image.col
        else:
            lines, wide = image.grids[1]
            own_y = torch.where(image.newline, rank, image.row)
            own_y = first + (2 * own_y + 1) * (last - first) // (2 * lines)
            own_x = west + (2 * image.col + 1) * (east - west) // (2 * wide)
        own_y, own_x = own_y // p - top, own_x // p - left
        own_x = torch.where(image.newline, columns, own_x)
        here = ((image.tile > 0) & (image.row >= 0)) | image.newline
        here &= (own_y >= 0) & (own_y < rows) & (own_x >= 0)
        here &= image.newline | (own_x < columns)
        group = torch.where(here, own_y * (columns + 1) + own_x, -1)
        return features, places, group


def _newlines(image: ImageTokens) -> Tensor:
    """[n + 1] long: place of the image's newline tokens among its tokens, in order; the rest
    is of no meaning."""
    rank = torch.where(image.newline, image.newline.cumsum(0) - 1, image.count)
    places = torch.zeros(image.count + 1, dtype=torch.long, device=rank.device)
    return places.scatter(0, rank, torch.arange(image.count, device=rank.device))


def _centres(grid: tuple[int, int], p: int, device: torch.device) -> Tensor:
    """Cells in the middle (⌊p/2⌋, ⌊p/2⌋) of all p×p windows, in raster order."""
    y = torch.arange(p // 2, grid[0], p, device=device)
    x = torch.arange(p // 2, grid[1], p, device=device)
    return (y[:, None] * grid[1] + x).flatten()


class _EarlyPoolStage(EncoderStage):
    def __init__(self, window: int, layer: int, positions: Positions) -> None:
        self.window = window
        self.after_layers = frozenset({layer})
        self.positions = positions

    def start(self, tower: TowerInput) -> EncoderRun:
        return _EarlyPoolRun(self.window, tower)


class _EarlyPoolRun(EncoderRun):
    def __init__(self, window: int, tower: TowerInput) -> None:
        self.window, self.tower = window, tower

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        grid, p, cls = self.tower.facts.grid, self.window, tokens.first_patch
        pooled = grid_avg_pool(hidden[:, cls:], window=p, grid=grid)
        centres = _centres(grid, p, hidden.device) + cls
        lead = torch.arange(cls, device=hidden.device)
        y = torch.arange(grid[0], device=hidden.device)[:, None] // p
        x = torch.arange(grid[1], device=hidden.device) // p
        group = torch.cat([lead, (y * (grid[1] // p) + x).flatten() + cls])
        batch = hidden.shape[0]
        return Reduction(
            rows=torch.cat([lead, centres]).expand(batch, -1),
            hidden=torch.cat([hidden[:, :cls], pooled], dim=1),
            group=group.expand(batch, -1),
        )

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return EncoderOutcome(unpad=False)
