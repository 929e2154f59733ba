"""A call of the vision encoder in pieces: what these are, and what they leave, put together.

The encoder then holds a few images or frames at a time, and of what it made of the earlier ones the
features alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokprune.engine.images import ImageRecord
from tokprune.engine.model import ImageLayout, Tiles
from tokprune.errors import UnsupportedVideoError

#: fields of an encoder's output that are no features
_INSIDE = ("last_hidden_state", "hidden_states", "attentions")


@dataclass(frozen=True)
class Piece:
    """A part of a call of ``get_image_features`` or ``get_video_features``: whole images or tiles,
    or frames of one video."""

    #: arguments that are not those of the whole call, by name; the pixels are among them
    changes: dict[str, Any]
    images: list[ImageLayout] | Tiles
    #: number of its first image in the call
    first: int = 0
    #: its frames follow, in one video, those of the piece before
    continues: bool = False


def features_of(result: Any) -> Any:
    """What an encoder's method returned, without hidden states and attention maps."""
    if not hasattr(result, "pooler_output"):
        return result
    return type(result)(**{n: v for n, v in result.items() if n not in _INSIDE})


def joined(results: Sequence[Any], pieces: Sequence[Piece], axis: int = 1) -> Any:
    """What the encoder's method would have returned for the whole call.

    Args:
        results: of all pieces: a tensor of features [images, …] or a list or tuple of one tensor
            an image, or an output that holds either as ``pooler_output``.
        axis: of a tensor, along which the frames of a video follow each other.
    """
    first = results[0]
    if not isinstance(first, Tensor | list | tuple):
        features = joined([result.pooler_output for result in results], pieces, axis)
        return type(first)(pooler_output=features)
    whole: list[list[Tensor]] = []
    for result, piece in zip(results, pieces, strict=True):
        entries = [result] if isinstance(result, Tensor) else list(result)
        if piece.continues:
            whole[-1].append(entries.pop(0))
        whole += [[entry] for entry in entries]
    if isinstance(first, Tensor):
        return _cat([_cat(parts, axis) for parts in whole], 0)
    return type(first)([_cat(parts, 0) for parts in whole])


def _cat(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def joined_records(
    layouts: list[ImageLayout], pieces: Sequence[Piece], records: Sequence[list[ImageRecord]]
) -> list[ImageRecord]:
    """Records of all images of a call, from those of its pieces.

    Raises:
        UnsupportedVideoError: a stage dropped rows of some pieces of a video only.
    """
    whole: list[list[ImageRecord]] = []
    for piece, own in zip(pieces, records, strict=True):
        later = own[1:] if piece.continues else own
        if piece.continues:
            whole[-1].append(own[0])
        whole += [[record] for record in later]
    return [_of_video(layout, parts) for layout, parts in zip(layouts, whole, strict=True)]


def _of_video(layout: ImageLayout, parts: list[ImageRecord]) -> ImageRecord:
    """The record of a video, from those of its frames in pieces."""
    if len(parts) == 1:
        return parts[0]
    reduced = [part.features is not None for part in parts]
    if any(reduced) != all(reduced):
        raise UnsupportedVideoError(
            "the method left some pieces of a video as they are and took tokens from others; leave "
            "encode_at_once out, or make it as large as the video has frames"
        )
    own = replace(parts[0], layout=layout)
    for name in ("features", "score", "tag", "metric", "stands_for", "raw"):
        values = [getattr(part, name) for part in parts]
        if all(value is not None for value in values):
            setattr(own, name, torch.cat(values))
    if all(reduced):
        own.cell, own.history = _cells(parts), _history(parts)
    return own


def _cells(parts: list[ImageRecord]) -> Tensor:
    """Places of the survivors, numbered over all frames."""
    cells, start = [], 0
    for part in parts:
        assert part.cell is not None
        cells.append(torch.where(part.cell < 0, part.cell, part.cell + start))
        start += int((part.layout.packed >= 0).sum())
    return torch.cat(cells)


def _history(parts: list[ImageRecord]) -> list[tuple[int, Tensor]]:
    """Rows alive by layer and frame, −1 = padding. A layer that dropped nothing of a piece left
    what the one before it did, at first all."""
    layers = sorted({layer for part in parts for layer, _ in part.history})
    history = []
    for layer in layers:
        alive = [_alive(part, layer) for part in parts]
        most = max(slots.shape[1] for slots in alive)
        rows = [pad(slots, (0, most - slots.shape[1]), value=-1) for slots in alive]
        history.append((layer, torch.cat(rows)))
    return history


def _alive(part: ImageRecord, layer: int) -> Tensor:
    """Rows of each frame [frames, rows] that were alive after a layer."""
    known = [slots for n, slots in part.history if n <= layer]
    if known:
        return known[-1]
    segments = part.layout.segments
    assert segments is not None
    first = part.history[0][1]
    return torch.arange(segments.full[0], device=first.device).expand(len(first), -1)
