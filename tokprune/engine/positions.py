"""Rotary positions of shortened sequences, and the tables that a model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokprune.errors import UnsupportedModelError

#: larger than any position
_FAR = torch.iinfo(torch.long).max


def at(table: Tensor, column: Tensor) -> Tensor:
    """Rows of a table [..., B or 1, L, d] at ``column`` [B, n] (−1: any): [..., B, n, d]."""
    column = column.to(table.device).clamp(min=0)
    table = table.expand(*table.shape[:-3], len(column), -1, -1)
    index = column[:, :, None].expand(*table.shape[:-3], -1, -1, table.shape[-1])
    return table.gather(-2, index)


def ids_at(position: Tensor, column: Tensor) -> Tensor:
    """Positions [..., B or 1, L] at ``column`` [B, n] (−1: any): [..., B, n]."""
    column = column.to(position.device).clamp(min=0)
    position = position.expand(*position.shape[:-2], len(column), -1)
    return position.gather(-1, column.expand(*position.shape[:-2], -1, -1))


def shifted(position: Tensor, shift: Tensor | None) -> Tensor:
    """Positions [..., B or 1, n] moved back by ``shift`` [B]."""
    if shift is None:
        return position
    return (position - shift.to(position.device)[:, None]).clamp(min=0)


# ------------------------------------------------------------------ closing up


def closed_up(
    position: Tensor, valid: Tensor, segment: Tensor, images: int, place: Tensor
) -> tuple[Tensor, Tensor]:
    """Positions of the survivors of a prompt, renumbered without gaps.

    With one axis they count on from the prompt's first token. With three (M-RoPE), text counts on,
    and of every image and axis the coordinates that are left become consecutive, from the place
    where the image begins; the text after it goes on after the largest of them. Survivors that
    form a sub-grid so get the positions of an image of that grid.

    Args:
        position: [B, L] or [3, B, L] of the untouched prompt.
        valid: [B, L] bool, its real tokens.
        segment: [B, L] its images, −1 for text.
        images: the most that a row has.
        place: [B, n] columns of the survivors, −1 = padding.

    Returns:
        Their positions [B, n] or [3, B, n], and by how much later tokens move back, [B].
    """
    alive = place >= 0
    if position.dim() == 2:
        first = position.masked_fill(~valid, _FAR).amin(1, keepdim=True)
        end = position.masked_fill(~valid, -1).amax(1) + 1
        rank = alive.cumsum(1) - 1
        moved = torch.where(alive, first + rank, 0)
        return moved, end - first[:, 0] - alive.sum(1)
    batch, length = valid.shape
    stays = torch.zeros(batch, length + 1, dtype=torch.bool, device=place.device)
    # padding writes into a spare last column
    stays = stays.scatter(1, torch.where(alive, place, length), torch.ones_like(alive))[:, :-1]
    new = position.clone()
    shift = torch.zeros(batch, dtype=position.dtype, device=position.device)
    arange = torch.arange(length, device=position.device)
    for image in range(images):
        own = segment == image
        kept = own & stays
        begin = position.masked_fill(~own, _FAR).amin(-1).amin(0)
        end = position.masked_fill(~own, -1).amax(-1).amax(0) + 1
        rank = _dense_rank(position.masked_fill(~kept, _FAR))
        here = begin - shift
        new = torch.where(kept, here[:, None] + rank, new)
        extent = torch.where(kept, rank, -1).amax(-1).amax(0) + 1
        last = torch.where(own, arange, -1).amax(1)
        lost = torch.where(last >= 0, end - begin - extent, 0)
        behind = (arange > last[:, None]) & (last >= 0)[:, None]
        new = torch.where(behind, new - lost[:, None], new)
        shift = shift + lost
    moved = ids_at(new, place)
    return torch.where(alive, moved, 0), shift


def _dense_rank(values: Tensor) -> Tensor:
    """Rank of each value among the different values of its row [..., L], from 0."""
    ordered, order = values.sort(-1)
    step = torch.zeros_like(ordered)
    step[..., 1:] = (ordered[..., 1:] != ordered[..., :-1]).to(step.dtype)
    return torch.zeros_like(values).scatter(-1, order, step.cumsum(-1))


# ------------------------------------------------------------------ the model's own tables


@dataclass(eq=False)  # not frozen: torch.compile cannot make such
class RotaryCall:
    """A call of one of the language model's rotary modules."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def ids(self) -> Tensor:
        """The position ids [..., B or 1, L] of the call."""
        return next(x for x in (*self.args, *self.kwargs.values()) if _is_ids(x))

    def again(self, ids: Tensor) -> Any:
        """What the module makes of other position ids."""
        ids = ids.to(self.ids.device)
        args = tuple(ids if _is_ids(x) else x for x in self.args)
        kwargs = {name: ids if _is_ids(x) else x for name, x in self.kwargs.items()}
        return self.forward(*args, **kwargs)

    def made(self, table: Any) -> bool:
        """Whether ``table`` is the call's output."""
        return first(table) is first(self.output)


def _is_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dim() >= 2


def first(value: Any) -> Any:
    """The tensor that a table is told by: ``torch.compile`` compares no tuples."""
    return value[0] if isinstance(value, tuple | list) and value else value


def made_by(calls: Sequence[RotaryCall], table: Any) -> RotaryCall:
    """The call that made a layer's table.

    Raises:
        UnsupportedModelError: none did, so that the table cannot be made for other positions.
    """
    for call in calls:
        if call.made(table):
            return call
    raise UnsupportedModelError(
        "positions='compact' needs rotary tables for other positions, and this model's do not "
        "come from a rotary module of its language model; use positions='preserve'"
    )
