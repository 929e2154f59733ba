"""Rows of a batch: taken by position, and numbers on which rows of one image agree."""

from __future__ import annotations

import torch
from torch import Tensor


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows [*, n, C] of ``x`` [*, T, C] at the positions ``index`` [*, n] long."""
    return x.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))


def largest_together(count: Tensor, image: Tensor | None, name: str) -> Tensor:
    """The largest count [B] among the rows that have the same number.

    Args:
        count: [B] long.
        image: [B] long, a number per row (tiles of one image share it); None: all rows together.
        name: of this argument to the caller, for the error.

    Raises:
        ValueError: ``image`` has another shape.
    """
    if image is None:
        return count.amax().expand_as(count) if len(count) else count
    if image.shape != count.shape:
        raise ValueError(
            f"{name} has shape {tuple(image.shape)}; it should be [{len(count)}], a number per row"
        )
    apart = image[:, None] != image
    least = torch.iinfo(count.dtype).min
    return count.expand(len(count), -1).masked_fill(apart, least).amax(-1)
