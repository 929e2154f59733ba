"""Slow, loop-written clusterings that the operators and methods are compared with."""

from __future__ import annotations

from torch import Tensor

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
        clusters: list[list[int]] = [[] for _ in medoids]
        for i in range(n):
            home = medoids.index(i) if i in medoids else min(
                range(k), key=lambda c: far[medoids[c]][i]
            )  # fmt: skip
            clusters[home].append(i)
        moved = [min(own, key=lambda i: sum(far[i][j] for j in own)) for own in clusters]
        if moved == medoids:
            break
        medoids = moved
    order = sorted(range(k), key=lambda c: medoids[c])
    medoids = [medoids[c] for c in order]
    clusters = [[] for _ in medoids]
    for i in range(n):
        home = medoids.index(i) if i in medoids else min(
            range(k), key=lambda c: far[medoids[c]][i]
        )  # fmt: skip
        clusters[home].append(i)
    return medoids, clusters
