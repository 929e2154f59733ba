"""Grid: keep an evenly spaced grid of patches, whatever they show. A strong trivial baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.engine.contracts import ImageTokens
from tokprune.methods.cells import check_whole, index_of_cells
from tokprune.methods.registry import register_method
from tokprune.methods.scoring import PromptSelector
from tokprune.operators.pooling import grid_sample, share


@register_method
@dataclass(frozen=True)
class Grid(PromptSelector):
    """Patches on a uniform grid over each tile, without any score.

    On tiled models the budget is shared between the tiles in proportion to the cells of each
    that show the image (padding is out), and adds up exactly, and so it is between the frames of
    a video; newline tokens go.

    Args:
        keep: visual tokens per image (count) or fraction of the image's patches.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.

    Source: spatial sampling baseline of Cai et al., "Matryoshka Multimodal Models", ICLR 2025,
    arXiv 2405.17430. The paper gives no offsets; :func:`tokprune.operators.grid_sample` has ours.
    """

    name = "grid"
    needs = "nothing"
    source = "ours"
    paper = "arXiv 2405.17430 (spatial sampling)"
    control = True

    def select(self, image: ImageTokens, keep: int) -> Tensor:
        check_whole(image, self.name)
        windows = image.windows()
        cells = [(bottom - top) * (right - left) for top, bottom, left, right in windows]
        budgets = share(min(keep, sum(cells)), cells)
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
        return index_of_cells(image)[wanted]
