"""How many tokens each one stands for after others were dropped or merged: the sizes of rectified
attention (:class:`~tokprune.engine.contracts.Rectify`), 1 for a token that stands for itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokprune.engine.contracts import (
    ImageTokens,
    KeepDecision,
    Rectify,
    Selection,
    SequenceView,
    TowerTokens,
)
from tokprune.operators.anchors import nearest


def joined(size: Tensor, group: Tensor, number: int) -> Tensor:
    """Sizes [*, number] float32 of groups: the sum of those [*, n] of their members; ``group``
    [*, n] long, −1 for none."""
    spare = torch.where(group < 0, number, group)
    total = size.new_zeros(*size.shape[:-1], number + 1)
    return total.scatter_add(-1, spare, size)[..., :number]


def in_tower(
    rectify: Rectify, tokens: TowerTokens, group: Tensor, rows: Tensor, hidden: Tensor
) -> Tensor:
    """Sizes [B, T'] after a reduction of encoder rows ``tokens``, ``hidden`` [B, T, D], to ``rows``
    [B, T'] (−1 = padding), ``group`` [B, T] the new row of each old one."""
    size = tokens.size
    if size is None:
        size = torch.ones(group.shape, device=group.device)
    if tokens.valid is not None:
        size = size * tokens.valid
    if rectify.dropped == "nearest":
        # nothing joins the class token, or rows that a stage added
        segment = (tokens.slots < 0).long()
        group = torch.where(group < 0, nearest(hidden, rows, segment), group)
    return joined(size, group, rows.shape[1])


def at_input(rectify: Rectify, image: ImageTokens, answer: Selection) -> Tensor:
    """Sizes [k] of an image's tokens after a selection."""
    group, index = answer.group, answer.index
    if group is None:
        number = torch.arange(index.shape[0], device=index.device)
        group = torch.full((image.count,), -1, device=index.device).scatter(0, index, number)
    if rectify.dropped == "nearest" and index.shape[0]:
        group = torch.where(group < 0, nearest(image.features, index), group)
    size = image.stands_for
    if size is None:
        size = torch.ones(image.count, device=index.device)
    return joined(size, group, index.shape[0])


def in_decoder(
    rectify: Rectify, hidden: Tensor, sequence: SequenceView, keep: KeepDecision, index: Tensor
) -> Tensor:
    """Sizes [B, L'] after a drop in a decoder: ``hidden`` [B, L, D] and ``sequence`` before it,
    ``index`` [B, L'] the old places of what is left (−1 = padding)."""
    batch, length = sequence.column.shape
    arange = torch.arange(length, device=index.device).expand(batch, -1)
    own = torch.where(index < 0, length, index)
    stays = torch.zeros(batch, length + 1, dtype=torch.bool, device=index.device)
    stays = stays.scatter(1, own, torch.ones_like(stays[:, : own.shape[1]]))[:, :length]
    group = torch.where(stays, arange, -1)
    if keep.group is not None:  # of what stages see: guesses behind it are not theirs
        known = pad(keep.group, (0, length - keep.group.shape[1]), value=-1)
        group = torch.where(stays | (known < 0), group, known)
    if rectify.dropped == "nearest":
        near = nearest(hidden, index, sequence.segment)
        place = index.gather(1, near.clamp(min=0))
        group = torch.where((group < 0) & (near >= 0) & sequence.visual, place, group)
    size = sequence.size
    if size is None:
        size = torch.ones(batch, length, device=index.device)
    place = index.clamp(min=0)
    visual = sequence.visual.gather(1, place) & (index >= 0)
    return torch.where(visual, joined(size, group, length).gather(1, place), 1.0)
