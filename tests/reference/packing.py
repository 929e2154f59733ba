"""The order in which published code puts the survivors of a tiled image into the prompt: (tile,
row) pairs [n, 2], tile 0 the base image."""

from __future__ import annotations

import torch
from torch import Tensor


def raster_pack(
    kept: Tensor,
    tiles: tuple[int, int],
    side: int,
    base: int,
    bounds: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """FlowCut: ``base`` rows of the base tile, then the patches kept in all crops, in raster order
    of the stitched map.

    ``kept`` [h·w, K]: patch numbers of each crop; ``bounds``: the (top, bottom, left, right) of
    the map that shows the image; None: all of it.
    """
    down, across = tiles
    at = {
        (t // across * side + p // side, t % across * side + p % side): (t + 1, row)
        for t, own in enumerate(kept.tolist())
        for row, p in enumerate(own)
    }
    top, bottom, left, right = bounds or (0, down * side, 0, across * side)
    order = [(0, i) for i in range(base)]
    order += [at[y, x] for y, x in sorted(at) if top <= y < bottom and left <= x < right]
    return torch.tensor(order)


def visionzip_pack(
    dominant: Tensor, contextual: int, tiles: tuple[int, int], side: int, base: int
) -> Tensor:
    """VisionZip: base tile, kept patches of all crops in raster order, class tokens, merged ones.

    ``dominant`` [h·w, D]: tokens kept in each crop, 0 the class token, patch p as p + 1.
    """
    number, count = dominant.shape
    patches = dominant.sort(-1).values[:, 1:] - 1
    order = [(0, i) for i in range(base)]
    order += [(t, row + 1) for t, row in raster_pack(patches, tiles, side, 0).tolist()]
    order += [(t + 1, 0) for t in range(number)]
    order += [(t + 1, count + c) for t in range(number) for c in range(contextual)]
    return torch.tensor(order)
