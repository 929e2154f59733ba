"""Matchings and merges over whole similarity matrices, and matchings that no method runs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokprune.operators.merging import MergePlan

#: keep, src, dst, slot, as in ``MergePlan``
Lists = tuple[Tensor, Tensor, Tensor, Tensor]


def gathered(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


# ------------------------------------------------------------------------------- matchings


def bsm(metric: Tensor, r: int, class_token: bool = True) -> Lists:
    """ToMe's matching with exactly r merges: the class token joins only where all others do."""
    unit = F.normalize(metric, dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)
    if class_token:
        scores[:, 0, :] = -math.inf
    best, match = scores.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    joining, staying = order[:, :r], order[:, r:]
    if class_token:
        staying = staying.sort(-1).values
    odd = torch.arange(1, metric.shape[1], 2).expand(metric.shape[0], -1)
    return 2 * staying, 2 * joining, odd, match.gather(1, joining)


def kth_bipartite(metric: Tensor, k: int) -> MergePlan:
    """The first k−1 tokens of every run of k join their best last-of-run token; the T mod k tokens
    at the end are dropped (ToMe, appendix)."""
    unit = F.normalize(metric, dim=-1)
    batch, tokens = metric.shape[:2]
    position = torch.arange(tokens // k * k).view(-1, k)
    src, dst = position[:, :-1].flatten(), position[:, -1]
    slot = (unit[:, src] @ unit[:, dst].mT).argmax(-1)
    return MergePlan(
        src.new_empty(batch, 0), src.expand(batch, -1), dst.expand(batch, -1), slot, tokens
    )


def random_bipartite(metric: Tensor, r: int, permutation: Tensor) -> MergePlan:
    """The first r tokens of a permutation [B, T] join the most similar of the others (ToMe,
    ablations)."""
    unit = F.normalize(metric, dim=-1)
    src, dst = permutation[:, :r], permutation[:, r:]
    slot = (gathered(unit, src) @ gathered(unit, dst).mT).argmax(-1)
    return MergePlan(src[:, :0], src, dst, slot, metric.shape[1])


def energy(metric: Tensor, margin: float, kind: str, alpha: float = 1.0) -> Tensor:
    """[B, T] energy of PiToMe from the whole similarity matrix."""
    unit = F.normalize(metric, dim=-1)
    x = unit @ unit.mT
    sigma = 1 - margin
    scale = sigma * math.sqrt(2 * math.pi)
    floor = alpha * (torch.exp(x - margin) - 1)
    if kind == "elu":
        value = torch.where(x > margin, x - margin, floor)
    elif kind == "paper":
        value = torch.where(x >= margin, x, floor)
    elif kind == "gauss":
        value = (2 * torch.exp(-(((1 - x) / sigma) ** 2)) - 1) / scale
    elif kind == "gauss_text":
        value = torch.exp(-0.5 * ((1 - x) / sigma) ** 2) / scale
    else:
        assert kind == "elu_sharp"
        sharp = (x - margin) / 0.01
        value = torch.where(sharp > 0, sharp, alpha * (torch.exp(sharp) - 1))
    return value.mean(-1)


def pitome(metric: Tensor, ratio: float, margin: float, kind: str) -> Lists:
    x = metric[:, 1:]
    r = math.floor(x.shape[1] - x.shape[1] * ratio)
    order = energy(x, margin, kind).argsort(-1, descending=True)
    mergeable, protected = order[:, : 2 * r], order[:, 2 * r :]
    a, b = mergeable[:, ::2], mergeable[:, 1::2]
    between = _between(x, a, b)
    return F.pad(protected + 1, (1, 0)), a + 1, b + 1, between.argmax(-1)


def energy_bsm(metric: Tensor, ratio: float, margin: float, kind: str) -> Lists:
    x = metric[:, 1:]
    r = math.floor(x.shape[1] - x.shape[1] * ratio)
    order = energy(x, margin, kind).argsort(-1, descending=True)
    a, b = order[:, ::2], order[:, 1::2]
    best, match = _between(x, a, b).max(-1)
    rank = best.argsort(-1, descending=True)
    keep = F.pad(a.gather(1, rank[:, r:]) + 1, (1, 0))
    return keep, a.gather(1, rank[:, :r]) + 1, b + 1, match.gather(1, rank[:, :r])


def _between(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    unit = F.normalize(x, dim=-1)
    between = gathered(unit @ unit.mT, a)
    return between.gather(2, b[:, None].expand(-1, a.shape[1], -1))


# ------------------------------------------------------------------------------- merges


def apply(x: Tensor, lists: Lists, mode: str = "mean") -> Tensor:
    keep, src, dst, slot = lists
    merged = gathered(x, dst).scatter_reduce(
        1, slot[..., None].expand(-1, -1, x.shape[-1]), gathered(x, src), mode, include_self=True
    )
    return torch.cat([gathered(x, keep), merged], dim=1)


def weighted(x: Tensor, size: Tensor, lists: Lists) -> tuple[Tensor, Tensor]:
    total = apply(size, lists, "sum")
    return apply(x * size, lists, "sum") / total, total
