"""Rows of a batch: taken by position, and numbers on which rows of one image agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokprune.operators.kernels import available


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows [*, n, C] of ``x`` [*, T, C] at the positions ``index`` [*, n] long."""
    return x.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))


def gather_rows(tensors: Sequence[Tensor], index: Tensor) -> tuple[Tensor, ...]:
    """The same rows of several tensors: hidden states, positions, tables.

    Args:
        tensors: each [B, T, *], of any dtype and width, with any strides of batch and row (a table
            that the batch shares may be expanded).
        index: [B, n] long, below T; −1 (padding) reads row 0.

    Returns:
        New tensors [B, n, *], each in its dtype.

    Raises:
        ValueError: ``index`` is not long [B, n], or a tensor is not [B, T, *].

    Source: ours.
    """
    if index.dim() != 2 or index.dtype != torch.long:
        raise ValueError(
            f"index is {index.dtype} {tuple(index.shape)}; it should be torch.int64 [B, n]"
        )
    for at, x in enumerate(tensors):
        if x.dim() < 2 or len(x) != len(index) or x.shape[1] != tensors[0].shape[1]:
            raise ValueError(
                f"tensors[{at}] has shape {tuple(x.shape)}; it should be [{len(index)}, T, *] with "
                "the same T for all"
            )
    if tensors and available(index, *tensors):
        from tokprune.operators.kernels.gather import gathered

        return gathered(tensors, index)
    image = torch.arange(len(index), device=index.device)[:, None]
    place = index.clamp(min=0)
    return tuple(x[image, place] for x in tensors)


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
