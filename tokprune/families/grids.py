"""Images of any size: grids of patches that the model merges to fewer cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.model import ImageLayout, Segments, TokenGrid

#: why no stage works in a tower that packs its images
PACKED = (
    "its vision encoder packs all images into one sequence and merges {m}×{m} patches of each at "
    "its end"
)

Mean = Callable[[Tensor], Tensor]

#: from (frames, height, width) in patches to what attends to each other in the encoder
SegmentsOf = Callable[[int, int, int], Segments]


def image_of(
    height: int, width: int, frames: int = 1, video: bool = False, broken: bool = False,
    segments: Segments | None = None, size: tuple[int, int] | None = None, mean: Mean | None = None,
) -> ImageLayout:  # fmt: skip
    """An image, or a video, of frames of ``height`` × ``width`` cells, in raster order."""
    return ImageLayout(
        torch.arange(frames * height * width), frames, size, frames=frames, video=video,
        token_grid=TokenGrid(((height, width),) * frames, mean), broken=broken, segments=segments,
    )  # fmt: skip


def blocks_mean(values: Tensor, merge: int, order: Tensor | None) -> Tensor:
    """Values [frames, N, …] of patches that stand cell after cell, as means of the cells [frames ·
    cells, …] in raster order; ``order`` [cells]: raster number of each, where they are moved."""
    cells = values.unflatten(1, (-1, merge * merge)).mean(2)
    if order is not None:
        cells = torch.empty_like(cells).index_copy(1, order.to(cells.device), cells)
    return cells.flatten(0, 1)


def raster_mean(values: Tensor, merge: int, height: int, width: int) -> Tensor:
    """Values [tiles, N, …] of ``height`` × ``width`` patches in raster order, as means of squares
    of ``merge`` patches each way: [tiles · cells, …]."""
    grid = values.unflatten(1, (height // merge, merge, width // merge, merge))
    return grid.mean((2, 4)).flatten(0, 2)


def window_order(height: int, width: int, window: int) -> Tensor:
    """Raster number of each of ``height`` × ``width`` cells, window after window."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across = -(-width // window)
    number = (y // window) * across + x // window
    return number.flatten().sort(stable=True).indices


def whole_frames(frames: int, height: int, width: int) -> Segments:
    """Every frame attends to itself, in all layers."""
    return Segments((height * width,) * frames, (height * width,) * frames)


def windowed_frames(window: int) -> SegmentsOf:
    """Every frame attends to itself in some layers, and in the others to windows of ``window`` ×
    ``window`` patches."""

    def segments(frames: int, height: int, width: int) -> Segments:
        rows = [min(window, height - y) for y in range(0, height, window)]
        columns = [min(window, width - x) for x in range(0, width, window)]
        windows = tuple(a * b for a in rows for b in columns)
        return Segments((height * width,) * frames, windows * frames)

    return segments


def grid_images(
    grids: Any, merge: int, segments: SegmentsOf = whole_frames, video: bool = False,
    broken: bool = False, window: int | None = None,
) -> list[ImageLayout]:  # fmt: skip
    """Images or videos by their ``grids`` [n, 3], (frames, height, width) in patches, of which the
    model merges ``merge`` × ``merge`` to a cell; ``window``: cells each way of the windows that the
    encoder moves them to."""
    rows: Sequence[Sequence[int]] = torch.as_tensor(grids).tolist()
    found = []
    for t, h, w in rows:
        down, across = h // merge, w // merge
        order = None if window is None else window_order(down, across, window)
        mean = partial(blocks_mean, merge=merge, order=order)
        frames = t if video else 1
        found.append(image_of(down, across, frames, video, broken, segments(t, h, w), mean=mean))
    return found
