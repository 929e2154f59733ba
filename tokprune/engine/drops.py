"""A drop before a decoder layer: from a decision to the shorter sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokprune.engine.contracts import KeepDecision, SequenceView
from tokprune.engine.positions import closed_up, ids_at

#: larger than any column
_FAR = torch.iinfo(torch.long).max


@dataclass(frozen=True)
class Drop:
    """One drop before decoder layer ``layer``, for the trace."""

    layer: int
    #: [B, L] of the sequence before it
    segment: Tensor
    #: [B, L'] old place of every entry after it, −1 = padding
    index: Tensor
    #: [B, L] of a merge (see :class:`KeepDecision`)
    group: Tensor | None


def survivors(
    sequence: SequenceView, keep: KeepDecision, native: SequenceView
) -> tuple[SequenceView, Tensor] | None:
    """The sequence that a decision leaves of one that comes from the prompt ``native``, and the old
    place [B, L'] of its entries (−1 = padding, at the left); None where everything stays.

    The last real token of a row stays always, and stays the last: the answer is read there.
    """
    mask, counts = keep.mask, keep.counts
    if any(sequence.ends_in_image) and not keep.last_stays:
        arange = torch.arange(mask.shape[1], device=mask.device)
        mask, counts = mask | (arange == sequence.last_row()), None
    if counts is None:
        images = torch.arange(sequence.segments, device=sequence.segment.device)
        one_hot = (sequence.segment[:, :, None] == images) & mask[:, :, None]
        read = one_hot.sum(1).tolist()  # adaptive: the numbers must reach the host
        counts = [row[: len(own)] for row, own in zip(read, sequence.counts)]
    if counts == sequence.counts:
        return None
    stays = sequence.valid & (mask | ~sequence.visual)
    arange = torch.arange(stays.shape[1], device=stays.device)
    order = arange
    if keep.order is not None:
        order = keep.order.masked_fill(arange == sequence.last_row(), _FAR)
    key = torch.where(stays, order, -1)
    compact = keep.positions == "compact"
    return shortened(sequence, key, counts, compact, native, ordered=keep.order is None)


def shortened(
    sequence: SequenceView, key: Tensor, counts: list[list[int]], compact: bool,
    native: SequenceView, ordered: bool = True, column: Tensor | None = None,
) -> tuple[SequenceView, Tensor]:  # fmt: skip
    """The tokens of a sequence with a ``key`` [B, L] ≥ 0, in its order, and their old places.

    Args:
        counts: visual tokens left, by batch row and image (host).
        compact: close the gaps that this leaves in the positions of a row; rows that lose nothing
            stay as they are.
        native: the untouched prompt.
        ordered: ``key`` ascends.
        column: [B, L] prompt columns of the tokens where they are not those of the sequence.
    """
    # columns of a wider prompt share positions
    changed = [native.wider or new != old for new, old in zip(counts, sequence.counts)]
    lengths = [
        n - sum(old) + sum(new) for n, old, new in zip(sequence.lengths, sequence.counts, counts)
    ]
    longest = max(lengths)
    top = key.sort(dim=1, stable=True)
    index = top.indices.masked_fill(top.values < 0, -1)[:, key.shape[1] - longest :]
    gone, place = index < 0, index.clamp(min=0)

    def taken(values: Tensor) -> Tensor:
        return values.gather(1, place).masked_fill(gone, -1)

    slot, moved = taken(sequence.slot), column is not None
    if column is not None:
        column = taken(column)
    else:
        column = slot if sequence.slot is sequence.column else taken(sequence.column)
    if not ordered:
        slot = slot.sort(1).values
    own = place if not moved else column
    position = ids_at(sequence.position, own).masked_fill(gone, 0)
    shift = sequence.shift
    where = None if sequence.place is None else taken(sequence.place)
    behind_here = sequence.place_shift
    if compact and any(changed):
        rows = torch.tensor(changed).to(column.device, non_blocking=True)
        whole = sequence.position if sequence is native else native.position.to(column.device)
        anew, behind = closed_up(
            whole, native.valid.to(column.device), native.segment.to(column.device),
            native.segments, column,
        )  # fmt: skip
        position = torch.where(rows[:, None], anew, position)
        shift = torch.where(rows, behind, 0 if shift is None else shift)
        first = native.column.to(column.device).masked_fill(~native.valid.to(column.device), _FAR)
        rank = first.amin(1, keepdim=True) + (column >= 0).cumsum(1) - 1
        where = torch.where(rows[:, None], rank, slot if where is None else where)
        fewer = native.width - first.amin(1) - (column >= 0).sum(1)
        behind_here = torch.where(rows, fewer, 0 if behind_here is None else behind_here)
    return replace(
        sequence,
        column=column,
        slot=slot,
        position=position,
        segment=taken(sequence.segment),
        after=sequence.after.gather(1, place) & ~gone,
        counts=counts,
        lengths=lengths,
        shift=shift,
        tag=None if sequence.tag is None else sequence.tag.gather(1, place) & ~gone,
        size=None if sequence.size is None else sequence.size.gather(1, place),
        padded=min(lengths) < longest,
        place=where,
        place_shift=behind_here,
        gaps=sequence.gaps or not compact,
    ), index
