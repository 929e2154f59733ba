"""Positions of three axes where images are reduced: what is left of one keeps the place it had, and
the text behind it goes on where it would without pruning.

Where text stands follows from the grids alone, so it is right even where an image comes from a
cache and is not encoded. Where the rows of an image stand only its features tell: they bring it
along in four more columns, 0, row, column and a mark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

COLUMNS = 4
#: the largest row or column that the narrowest dtype, bfloat16, can tell from its neighbours
LARGEST = 256

#: an image, a video or a frame with text around it: place of the first token, number of tokens,
#: whether it is an image, grid (frames, height, width), and seconds a frame stands for
Media = tuple[int, int, bool, tuple[int, int, int], float]


def with_places(features: Tensor, cell: Tensor, width: int) -> Tensor:
    """Features [k, D] with the columns of the cells [k] of a grid that they stand for."""
    zeros, ones = torch.zeros_like(cell), torch.ones_like(cell)
    places = torch.stack([zeros, cell // width, cell % width, ones], dim=1)
    return torch.cat([features, places.to(features.dtype)], dim=1)


def without_places(features: Tensor) -> Tensor:
    """Features [k, D] with columns of no meaning: their positions stay as they are."""
    return torch.cat([features, features.new_zeros(len(features), COLUMNS)], dim=1)


def prompt_positions(length: int, media: Iterable[Media]) -> tuple[Tensor, int]:
    """Positions [3, L] of a prompt before any image is encoded, and what is added to a token's
    number behind it.

    Args:
        length: L.
        media: in order. All tokens of an image get the position of its first.
    """
    parts: list[Tensor] = []
    done = following = 0
    for offset, tokens, image, (frames, height, width), factor in media:
        parts.append(_text(offset - done, following))
        following += offset - done
        if image:
            parts.append(torch.full((3, tokens), following))
            following += max(height, width)
        else:
            t, h, w = (torch.arange(n) for n in (frames, height, width))
            grid = torch.meshgrid((t * factor).long(), h, w, indexing="ij")
            own = torch.stack([axis.flatten() for axis in grid]) + following
            parts.append(own)
            following = int(own.max()) + 1
        done = offset + tokens
    parts.append(_text(length - done, following))
    following += length - done
    return torch.cat(parts, dim=1), following - length


def _text(length: int, first: int) -> Tensor:
    return (torch.arange(length) + first).expand(3, -1)


def placed(
    positions: Tensor, media: Tensor, computed: int, features: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, int]:
    """What a runner asks for when features of a part of a prompt have come: these without their
    columns, the prompt's positions with those of their rows, and what is added behind it.

    The place of an image is the one after the text before it, so that it may be asked again, and
    in any parts.

    Args:
        positions: [3, L].
        media: [L] bool, tokens of images and videos.
        computed: tokens before this part.
        features: [k, D + 4] of its tokens that are no text, in order.
    """
    length = media.shape[0]
    positions = positions.clone()
    clean = [own[:, :-COLUMNS] for own in features]
    if clean:
        own = torch.cat([part[:, -COLUMNS:] for part in features]).to(positions.device).long()
        at = media.nonzero()[:, 0]
        at = at[at >= computed][: len(own)]
        number = torch.arange(length, device=media.device)
        text = torch.where(media, -1, number).cummax(0).values[at]
        base = torch.where(text < 0, 0, positions[0, text.clamp(min=0)] + 1)
        placed = base + own[:, :3].T
        positions[:, at] = torch.where(own[:, 3] > 0, placed, positions[:, at])
    last = int(positions[:, :length].max())
    return clean, positions, last + 1 - length


def grids(model: Any, features: Sequence[Any]) -> list[Media]:
    """Images and videos of a prompt, by what a model of vLLM says of their grids."""
    ordered = sorted(features, key=lambda own: own.mm_position.offset)
    found: list[Media] = []
    for own, (offset, frames, height, width, factor) in zip(
        ordered, model.iter_mm_grid_thw(features), strict=True
    ):
        tokens = own.mm_position.length
        image = own.modality == "image"
        found.append((offset, tokens, image, (frames, height, width), factor))
    return found
