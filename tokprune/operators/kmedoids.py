"""Deterministic k-medoids: farthest-first start, then assign and re-centre until nothing moves."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from tokprune.operators.checks import check_choice, check_number, check_points
from tokprune.operators.diversity import k_center_from_distance

__all__ = ["Distance", "Medoids", "kmedoids", "pairwise"]

Distance = Literal["euclidean", "cosine"]

#: Rounds of assigning and re-centring. Random points of several kinds (147 to 588 of them, 16 to
#: 192 clusters) settled in at most 7.
ITERATIONS = 10

#: Rows of a map of pairs that are worked on at a time.
_CHUNK = 256

#: Norms this close (relative) to the largest count as equal where all norms are one by definition.
_EQUAL_NORMS = 1e-4


class Medoids(NamedTuple):
    """Clusters of n points around k of them. Every medoid is in its own cluster."""

    #: [*, k] long: the points that stand for the clusters
    medoids: Tensor
    #: [*, n] long: the cluster of every point, an index into ``medoids``
    assign: Tensor


@torch.no_grad()
def kmedoids(
    x: Tensor,
    k: int,
    *,
    distance: Distance = "euclidean",
    p: float = 2.0,
    pre_norm: bool = False,
    iterations: int = ITERATIONS,
    sort: bool = True,
) -> Medoids:
    """k-medoids whose start is the longest vector, then always the point farthest from the chosen.

    Each round assigns every point to its nearest medoid and makes the member with the smallest
    summed distance to its cluster the new medoid. Rounds after the last change do nothing, so a
    fixed number of them needs no look at the values; on the CPU they are left out. Points settle
    one sample by the other: results do not depend on what else is in the batch. No cluster is ever
    empty. Ties go to the lower index: distances are exactly symmetric with a zero diagonal, so the
    two members of a pair always tie and the earlier one stays.

    Args:
        x: [*, n, d] of any float dtype; norms are float32, products of pairs float64.
        k: clusters, 1 ≤ k ≤ n; k = n gives every point its own.
        distance: ``euclidean`` (Minkowski of order ``p``) or ``cosine`` (1 − cos).
        p: order of the Minkowski distance, > 0; orders other than 2 are slow.
        pre_norm: scale every vector to length one first.
        iterations: most rounds, at least 1.
        sort: number the clusters by the position of their medoid.

    Returns:
        ``Medoids`` with shapes [*, k] and [*, n].

    Raises:
        ValueError: ``x`` has fewer than two dimensions, or an argument is out of range.

    Source: Zhao et al. 2022, arXiv 2205.00823, section 3.2 (k-medoids++ with the KKZ start of
    Katsavounidis et al. 1994, as in the official code).
    """
    check_points(x)
    lead, n = x.shape[:-2], x.shape[-2]
    check_number("k", k, n, "points")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it should be at least 1")
    points = rearrange(x, "... n d -> (...) n d").float()
    if pre_norm:
        points = _unit(points)
    first = _longest(points, tolerance=_EQUAL_NORMS if pre_norm else 0.0)
    medoids, assign = _settle(pairwise(points, distance, p), first, k, iterations, sort)
    return Medoids(medoids.reshape(*lead, k), assign.reshape(*lead, n))


def pairwise(x: Tensor, distance: Distance = "euclidean", p: float = 2.0) -> Tensor:
    """Distances of all pairs of points, exactly symmetric and zero on the diagonal.

    Products are float64 (float32 on devices without it), so that near-duplicates, which video
    frames are full of, keep their order and equal points have distance exactly 0.

    Args:
        x: [B, n, d] of any float dtype.
        distance: ``euclidean`` (Minkowski of order ``p``) or ``cosine`` (1 − cos).
        p: order, > 0.

    Returns:
        [B, n, n] float32.

    Raises:
        ValueError: unknown ``distance``, or ``p`` out of range.
    """
    check_choice("distance", distance, Distance)
    if not p > 0:
        raise ValueError(f"p is {p}; it should be positive")
    if distance == "euclidean" and p != 2:
        points = x.float()
    else:
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        points = _unit(x.to(wide)) if distance == "cosine" else x.to(wide)
        points = points - points.mean(1, keepdim=True)
    batch, n = x.shape[:2]
    made = torch.empty(batch, n, n, dtype=torch.float32, device=x.device)
    # rows from the diagonal on, and the same as columns: one map of pairs is held, in float32
    for start in range(0, n, _CHUNK):
        rows, behind = points[:, start : start + _CHUNK], points[:, start:]
        if distance == "euclidean" and p != 2:
            one_sided = torch.cdist(rows, behind, p=p)
        else:
            square = _squares(rows, behind)
            one_sided = square.div_(2) if distance == "cosine" else square.sqrt_()
        own = slice(start, start + rows.shape[1])
        upper = one_sided.float().triu(1)
        made[:, own, start:] = upper
        made[:, start:, own] = upper.mT
        block = upper[:, :, : rows.shape[1]]
        made[:, own, own] = block + block.mT
    return made


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances [B, m, n] of points [B, m, d] and [B, n, d] around the origin."""
    both = x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None, :]
    square = torch.baddbmm(both, x, y.mT, alpha=-2)
    # what is left of equal points is rounding: some hundred units in the last place
    return square.masked_fill_(square < 4096 * torch.finfo(y.dtype).eps * both, 0.0)


def _unit(x: Tensor) -> Tensor:
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-6)


def _longest(x: Tensor, tolerance: float) -> Tensor:
    """[B]: first point whose norm is, but for ``tolerance``, the largest."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    return (norm >= norm.amax(-1, keepdim=True) * (1 - tolerance)).int().argmax(-1)


def _settle(
    distance: Tensor, first: Tensor, k: int, iterations: int, sort: bool
) -> tuple[Tensor, Tensor]:
    """Medoids [B, k] and assignment [B, n] from distances [B, n, n] and the first medoid [B]."""
    medoids = k_center_from_distance(distance, k, first)
    for _ in range(iterations if k < distance.shape[-1] else 0):
        moved = _recentre(distance, _nearest(distance, medoids), k)
        # only where a look costs nothing; further rounds would find the same medoids
        if moved.device.type == "cpu" and torch.equal(moved, medoids):
            break
        medoids = moved
    if sort:
        medoids = medoids.sort(-1).values
    return medoids, _nearest(distance, medoids)


def _nearest(distance: Tensor, medoids: Tensor) -> Tensor:
    """[B, n]: the nearest medoid of every point; a medoid's is itself, even beside a duplicate."""
    batch, k = medoids.shape
    n = distance.shape[-1]
    rows = distance.gather(1, medoids[:, :, None].expand(batch, k, n))
    own = torch.arange(k, device=medoids.device).expand(batch, k)
    return rows.argmin(1).scatter(1, medoids, own)


def _recentre(distance: Tensor, assign: Tensor, k: int) -> Tensor:
    """[B, k]: of every cluster the member with the smallest sum of distances to the others."""
    batch, n = assign.shape
    costs = []
    for rows, near in zip(assign.split(_CHUNK, 1), distance.split(_CHUNK, 1)):
        together = rows[:, :, None] == assign[:, None, :]
        costs.append(torch.where(together, near, 0.0).sum(-1))
    cost = torch.cat(costs, dim=1)
    least = cost.new_full((batch, k), torch.inf).scatter_reduce(1, assign, cost, "amin")
    index = torch.arange(n, device=assign.device)
    candidate = torch.where(cost == least.gather(1, assign), index, n)
    found = assign.new_full((batch, k), n).scatter_reduce(1, assign, candidate, "amin")
    return found.clamp(max=n - 1)  # distances that are NaN have no least sum
