"""Clusterings of points and of video tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokprune.operators.diversity import k_center_from_distance
from tokprune.operators.kmedoids import Distance, pairwise

Points = list[list[float]]


def distances(points: Points, kind: str = "euclidean", p: float = 2.0) -> list[list[float]]:
    def one(a: list[float], b: list[float]) -> float:
        if kind == "cosine":
            norm = (sum(v * v for v in a) * sum(v * v for v in b)) ** 0.5
            return 1 - sum(v * w for v, w in zip(a, b)) / norm
        return float(sum(abs(v - w) ** p for v, w in zip(a, b)) ** (1 / p))

    n = len(points)
    table = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i):
            table[i][j] = table[j][i] = one(points[i], points[j])
    return table


def kmedoids_by_hand(
    x: Tensor, k: int, kind: str = "euclidean", p: float = 2.0
) -> tuple[list[int], list[list[int]]]:
    """Medoids, ascending, and the members of each."""
    points: Points = x.double().tolist()
    n, far = len(points), distances(points, kind, p)
    length = [sum(v * v for v in point) for point in points]
    medoids = [max(range(n), key=lambda i: length[i])]
    while len(medoids) < k:
        rest = [i for i in range(n) if i not in medoids]
        medoids.append(max(rest, key=lambda i: min(far[m][i] for m in medoids)))
    while True:
        moved = [
            min(own, key=lambda i: sum(far[i][j] for j in own)) for own in _members(far, medoids)
        ]
        if moved == medoids:
            break
        medoids = moved
    medoids = sorted(medoids)
    return medoids, _members(far, medoids)


def _members(far: list[list[float]], medoids: list[int]) -> list[list[int]]:
    clusters: list[list[int]] = [[] for _ in medoids]
    for i in range(len(far)):
        nearest = min(range(len(medoids)), key=lambda c: far[medoids[c]][i])
        clusters[medoids.index(i) if i in medoids else nearest].append(i)
    return clusters


def kkz(
    x: Tensor, k: int, distance: Distance = "euclidean", p: float = 2.0, pre_norm: bool = False
) -> Tensor:
    """[B, k]: the start of k-medoids, by our k-center: the longest vector, then the farthest from
    the chosen. Unit vectors are all equally long, whatever the rounding."""
    norm = x.norm(dim=-1, keepdim=True)
    points = x / (norm + 1e-6) if pre_norm else x
    first = torch.zeros(len(x), dtype=torch.long) if pre_norm else norm[..., 0].argmax(-1)
    return k_center_from_distance(pairwise(points, distance, p), k, first)


def kmedoids(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [n, d]: start farthest-first, then assign and re-centre over k masked distance maps."""
    distance = torch.cdist(x, x)
    distance.fill_diagonal_(-1)
    medoids = x.norm(dim=-1).argmax()[None]
    for _ in range(k - 1):
        nearest = distance[medoids].min(0).values
        medoids = torch.cat([medoids, nearest.argmax()[None]])
    for _ in range(100):
        assign = distance[medoids].argmin(0)
        member = assign == torch.arange(k)[:, None]
        cost = (distance * member[:, :, None] * member[:, None, :]).sum(-1)
        moved = cost.masked_fill(~member, torch.inf).argmin(-1)
        if torch.equal(moved, medoids):
            break
        medoids = moved
    medoids = medoids.sort().values
    return medoids, distance[medoids].argmin(0)


def spectral_clustering(x: Tensor, k: int, neighbours: int, sigma: float) -> tuple[Tensor, Tensor]:
    """x [n, d]: the graph, a full SVD of its Laplacian, k-medoids on the last k columns."""
    weights = torch.exp(-(torch.cdist(x, x) ** 2) / (2 * sigma**2))
    least = weights.sort(dim=-1, descending=True).values[:, neighbours - 1]
    linked = (weights >= least[:, None]) | (weights >= least[None, :])
    weights = weights * linked
    scale = weights.sum(-1).rsqrt().diag()
    laplacian = scale @ (weights.sum(-1).diag() - weights) @ scale
    rows = torch.linalg.svd(laplacian).U[:, -k:]
    return kmedoids(F.normalize(rows, dim=-1), k)


def evs(x: Tensor, k: int) -> Tensor:
    """x [T, n, d]: the first frame, and the k − n tokens least like the frame before."""
    change = 1 - torch.cosine_similarity(x[1:], x[:-1], dim=-1)
    change = torch.cat([torch.full_like(change[:1], 255), change]).flatten()
    return change.argsort(descending=True, stable=True)[:k].sort().values
