"""Greedy selections over whole similarity matrices, and what a selection is worth."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokprune.operators.diversity import k_center_from_distance


def cosines(x: Tensor) -> Tensor:
    """[n, n] of x [n, d]."""
    unit = x / x.norm(dim=-1, keepdim=True)
    return unit @ unit.T


def cosine_distance(x: Tensor) -> Tensor:
    """Pairwise 1 − cos [*, n, n] of x [*, n, d], float32; a zero row has cosine 0 with all."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    return 1 - unit @ unit.mT


def max_sum(x: Tensor, pivot: int, k: int, allowed: Tensor | None = None) -> Tensor:
    similarity = cosines(x)
    chosen, total = [pivot], similarity[:, pivot].clone()
    if allowed is not None:
        total[~allowed] = math.inf
    total[pivot] = math.inf
    for _ in range(k - 1):
        c = int(total.argmin())
        chosen.append(c)
        total += similarity[:, c]
        total[c] = math.inf
    return torch.tensor(chosen)


def k_center(x: Tensor, pivot: int, k: int, allowed: Tensor | None = None) -> Tensor:
    distance = 1 - cosines(x)
    chosen, nearest = [pivot], distance[:, pivot].clone()
    if allowed is not None:
        nearest[~allowed] = -math.inf
    nearest[pivot] = -math.inf
    for _ in range(k - 1):
        c = int(nearest.argmax())
        chosen.append(c)
        nearest = torch.minimum(nearest, distance[:, c])
        nearest[c] = -math.inf
    return torch.tensor(chosen)


def divprune(x: Tensor, k: int) -> Tensor:
    isolation = (1 - cosines(x)).topk(2, dim=0, largest=False).values[1]
    return k_center(x, int(isolation.argmax()), k)


def divprune_from_distance(distance: Tensor, k: int) -> Tensor:
    """DivPrune of a ready matrix [*, n, n], by our k-center of one."""
    apart = distance.float().masked_fill(torch.eye(distance.shape[-1], dtype=torch.bool), math.inf)
    return k_center_from_distance(distance, k, apart.amin(-1).argmax(-1))


def farthest_pivot(x: Tensor) -> Tensor:
    return torch.cosine_similarity(x, x.mean(0, keepdim=True), dim=-1).argmin()


def chosen_cosines(x: Tensor, chosen: Tensor) -> Tensor:
    """[*, n, k] of all tokens of x [*, n, d] with the chosen ones [*, k]."""
    x = x.float()
    index = chosen[..., None].expand(*chosen.shape, x.shape[-1])
    return torch.cosine_similarity(x[..., :, None, :], x.gather(-2, index)[..., None, :, :], dim=-1)


def summed_similarity(x: Tensor, chosen: Tensor) -> Tensor:
    """[*, n]: sum of the cosines of every token with the chosen ones (ToDRE v2, Algorithm 1)."""
    return chosen_cosines(x, chosen).sum(-1)


def min_distance(x: Tensor, chosen: Tensor) -> Tensor:
    """[*, n]: distance to the nearest chosen token, 0 at the chosen (the k-center objective)."""
    nearest = (1 - chosen_cosines(x, chosen)).amin(-1)
    return nearest.clamp(min=0).scatter(-1, chosen, 0.0)


def selection_radius(x: Tensor, order: Tensor) -> Tensor:
    """[*, k]: distance of each chosen token to those chosen before it, +inf for the first."""
    index = order[..., None].expand(*order.shape, order.shape[-1])
    distance = 1 - chosen_cosines(x, order).gather(-2, index)
    later = torch.ones(distance.shape[-2:], dtype=torch.bool).triu()
    return distance.masked_fill(later, math.inf).amin(-1)
