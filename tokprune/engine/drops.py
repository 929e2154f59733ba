"""A drop inside the decoder: from a method's decision to the shorter sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.engine.contracts import KeepDecision, SequenceView
from tokprune.engine.shorten import take


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


def survivors(sequence: SequenceView, keep: KeepDecision) -> tuple[SequenceView, Tensor] | None:
    """The sequence that a decision leaves, and the old place [B, L'] of its entries (−1 = padding,
    at the left); None where everything stays."""
    counts = keep.counts
    if counts is None:
        images = torch.arange(sequence.segments, device=sequence.segment.device)
        one_hot = (sequence.segment[:, :, None] == images) & keep.mask[:, :, None]
        read = one_hot.sum(1).tolist()  # adaptive: the numbers must reach the host
        counts = [row[: len(own)] for row, own in zip(read, sequence.counts)]
    if counts == sequence.counts:
        return None
    lengths = [
        n - sum(old) + sum(new) for n, old, new in zip(sequence.lengths, sequence.counts, counts)
    ]
    longest = max(lengths)
    stays = sequence.valid & (keep.mask | ~sequence.visual)
    arange = torch.arange(stays.shape[1], device=stays.device)
    key = torch.where(stays, arange if keep.order is None else keep.order, -1)
    top = key.sort(dim=1, stable=True)
    index = top.indices.masked_fill(top.values < 0, -1)[:, key.shape[1] - longest :]
    compact = keep.positions == "compact"
    return take(sequence, index, counts, lengths, min(lengths) < longest, compact), index
