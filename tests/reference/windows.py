"""MustDrop's window merge, one window after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def windows(window: tuple[int, int], grid: tuple[int, int]) -> list[list[int]]:
    """Grid indices of each window, both in raster order."""
    (a, b), (h, w) = window, grid
    return [
        [(y + i) * w + x + j for i in range(a) for j in range(b)]
        for y in range(0, h, a)
        for x in range(0, w, b)
    ]


def similarity(tokens: Tensor, members: list[int]) -> float:
    """Mean cosine of all ordered pairs of different members."""
    unit = F.normalize(tokens[members], dim=-1)
    cosine = unit @ unit.T
    pairs = len(members) * (len(members) - 1)
    return float((cosine.sum() - cosine.diagonal().sum()) / pairs)


def groups_of(boxes: list[list[int]], similar: list[float], r: int) -> list[list[int]]:
    """Grid tokens in each row after the merge of the r most uniform windows ``boxes``."""
    best = [boxes[w] for w in sorted(range(len(boxes)), key=lambda w: -similar[w])[:r]]
    gone = {i for members in best for i in members}
    return best + [[i] for i in range(sum(map(len, boxes))) if i not in gone]


def spatial_merge(x: Tensor, threshold: float, side: int, a: int) -> tuple[Tensor, Tensor]:
    """Tokens [1, M, D] after the merge of x [1, 1 + side², D], and the last grid token of every
    merged window [1, r]."""
    patches, boxes = x[0, 1:], windows((a, a), (side, side))
    similar = [similarity(patches, members) for members in boxes]
    r = sum(s >= threshold for s in similar)
    groups = groups_of(boxes, similar, r)
    rows = [patches[members].mean(0) for members in groups[:r]]
    alone = patches[[members[0] for members in groups[r:]]]
    out = torch.cat([x[0, :1], *(row[None] for row in rows), alone])
    return out[None], torch.tensor([[members[-1] for members in groups[:r]]])
