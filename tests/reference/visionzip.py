"""VisionZip from whole attention maps, one image after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.attention import full_map


def dominant(q: Tensor, k: Tensor, count: int) -> Tensor:
    score = full_map(q, k)[:, :, 0, 1:].sum(1)
    best = score.topk(count - 1, dim=-1).indices + 1
    return torch.cat([torch.zeros(len(best), 1, dtype=torch.long), best], dim=1)


def contextual(
    hidden: Tensor, metric: Tensor, kept: list[int], count: int
) -> tuple[Tensor, list[list[int]]]:
    """Merged rows [count, D] of one image [T, D], and the tokens in each, its target first."""
    if not count:
        return hidden[:0], []
    rest = [i for i in range(len(hidden)) if i not in kept]
    targets = rest[:: max(1, len(rest) // count)][:count]
    others = [i for i in rest if i not in targets]
    unit = F.normalize(metric, dim=-1)
    nearest = (unit[others] @ unit[targets].T).argmax(-1)
    member = F.one_hot(nearest, count).to(hidden)
    mean = member.T @ hidden[others] / member.sum(0).clamp(min=1)[:, None]
    groups = [[target] for target in targets]
    for token, row in zip(others, nearest.tolist()):
        groups[row].append(token)
    return hidden[targets] + mean, groups
