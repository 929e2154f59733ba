"""Grid: keep an evenly spaced grid of patches, whatever they show. A strong trivial baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    ImageTokens,
    ModelFacts,
    Plan,
    Positions,
    PromptStage,
    Selection,
)
from tokprune.methods.base import (
    Budget,
    Method,
    check_choice,
    check_fits,
    check_keep,
    register_method,
    resolve_keep,
)
from tokprune.operators.pooling import grid_sample, share


@register_method
@dataclass(frozen=True)
class Grid(Method):
    """Patches on a uniform grid over each tile, without any score.

    On tiled models the budget is shared between the tiles in proportion to the cells of each
    that show the picture (padding is out), and adds up exactly, and so it is between the frames of
    a video; newline tokens go.

    Args:
        keep: visual tokens per image (count) or fraction of the image's patches.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.

    Source: spatial sampling baseline of Cai et al., "Matryoshka Multimodal Models", ICLR 2025,
    arXiv 2405.17430. The paper gives no offsets; :func:`tokprune.operators.grid_sample` has ours.
    """

    name: ClassVar[str] = "grid"
    stages: ClassVar[tuple[str, ...]] = ("after projector",)
    needs: ClassVar[str] = "nothing"
    paper: ClassVar[str] = "arXiv 2405.17430 (spatial sampling)"

    keep: Budget
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice(self.positions, "positions", ("compact", "preserve"))

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        return Plan(prompt=(_GridStage(self.keep, self.positions),))


class _GridStage(PromptStage):
    def __init__(self, keep: Budget, positions: Positions) -> None:
        self.keep, self.positions = keep, positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return [self._one(image) for image in images]

    def _one(self, image: ImageTokens) -> Selection | None:
        k = resolve_keep(self.keep, image.patches)
        if k >= image.patches:
            return None
        windows = image.windows()
        cells = [(bottom - top) * (right - left) for top, bottom, left, right in windows]
        budgets = share(min(k, sum(cells)), cells)
        chosen, start = [], 0
        for (height, width), (top, bottom, left, right), n in zip(
            image.tile_grids(), windows, budgets
        ):
            if n:
                at = grid_sample(bottom - top, right - left, n)
                row, col = at // (right - left) + top, at % (right - left) + left
                chosen.append(start + row * width + col)
            start += height * width
        wanted = torch.cat(chosen).to(image.features.device, non_blocking=True)
        return Selection(index_of_cells(image)[wanted].sort().values)


def index_of_cells(image: ImageTokens) -> Tensor:
    """[tiles · H · W] long: where each cell stands among the image's tokens, −1 if nowhere; the
    cells of one tile's grid after the other."""
    if image.grids is None:
        height, width = image.grid
        number = image.tiles * height * width
        cell = (image.tile * height + image.row) * width + image.col
    else:
        sizes = [height * width for height, width in image.grids]
        number = sum(sizes)
        starts = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])
        both = torch.stack([starts, torch.tensor([width for _, width in image.grids])])
        both = both.to(image.tile.device, non_blocking=True)[:, image.tile.clamp(min=0)]
        cell = both[0] + image.row * both[1] + image.col
    cell = torch.where(image.row < 0, number, cell)  # newline and class tokens: a spare entry
    index = torch.full((number + 1,), -1, device=cell.device)
    return index.scatter(0, cell, torch.arange(image.count, device=cell.device))[:-1]


def keep_on_grid(image: ImageTokens, stay: Tensor, dropped: int) -> Tensor:
    """Tokens ``stay`` [k] (long, in any order) and all that stand on no cell (newline and class
    tokens), in prompt order: [count − dropped] long. ``dropped``: tokens on cells that go (host).
    """
    alive = (image.row < 0).scatter(0, stay, torch.ones_like(stay, dtype=torch.bool))
    return (~alive).to(torch.int8).sort(stable=True).indices[: image.count - dropped]
