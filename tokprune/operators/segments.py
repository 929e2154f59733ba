"""Segments of video frames: cluster their tokens and go on with one token per cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from tokprune.operators.checks import check_choice, check_number
from tokprune.operators.kmedoids import ITERATIONS, Distance, Medoids, kmedoids
from tokprune.operators.rows import take_rows
from tokprune.operators.spectral_clustering import (
    Graph,
    auto_neighbours,
    neighbourhood,
    spectral_clustering,
)

__all__ = [
    "Aggregate", "Algorithm", "Clusterer", "Reduced", "cluster_means", "segment_bounds",
    "segment_budgets", "segment_reduce", "sparse_positions",
]  # fmt: skip

Algorithm = Literal["kmedoids", "spectral", "pooling", "sparse_sampling"]
Aggregate = Literal["mean"]


@dataclass(frozen=True)
class Clusterer:
    """How the tokens of one segment become a few of them.

    ``distance``, ``p``, ``pre_norm`` and ``iterations``: see :func:`tokprune.operators.kmedoids`;
    ``graph`` and ``sigma``: see :func:`tokprune.operators.affinity`.

    Source: Zhao et al. 2022, arXiv 2205.00823.
    """

    #: ``kmedoids`` or ``spectral``; the baselines ``sparse_sampling`` (evenly spaced tokens) and
    #: ``pooling`` (mean of the frames, place by place)
    algorithm: Algorithm = "kmedoids"
    distance: Distance = "euclidean"
    p: float = 2.0
    pre_norm: bool = False
    iterations: int = ITERATIONS
    graph: Graph = "knn"
    sigma: float | None = 2.0
    #: of the "knn" graph; None: :func:`auto_neighbours`
    neighbours: int | None = None
    #: (cells, frames) within which tokens may be linked in the graph; None: no limit
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_choice("algorithm", self.algorithm, Algorithm)
        check_choice("distance", self.distance, Distance)
        check_choice("graph", self.graph, Graph)
        if not self.p > 0:
            raise ValueError(f"p={self.p!r} should be positive")
        if self.sigma is not None and not self.sigma > 0:
            raise ValueError(f"sigma={self.sigma!r} should be positive, or None")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations!r} should be at least 1")
        if self.neighbours is not None and self.neighbours < 1:
            raise ValueError(f"neighbours={self.neighbours!r} should be at least 1, or None")

    def __call__(
        self, x: Tensor, k: int, frames: int = 1, grid: tuple[int, int] | None = None
    ) -> Medoids:
        """Clusters of the tokens of segments.

        Args:
            x: [*, frames · n, d], frame by frame.
            k: tokens to keep, 1 ≤ k ≤ frames · n.
            frames: frames of a segment.
            grid: (height, width) of a frame; needed where ``window`` is set.

        Returns:
            ``Medoids`` [*, k] and [*, frames · n], medoids ascending. Sparse sampling has no
            clusters: a token belongs to the last sample before it, or to the first.

        Raises:
            ValueError: ``k`` is out of range, ``grid`` is missing or does not fit, or the algorithm
                is "pooling", which has no medoids.
        """
        n = x.shape[-2] // frames
        if self.algorithm == "kmedoids":
            return kmedoids(
                x, k, distance=self.distance, p=self.p, pre_norm=self.pre_norm,
                iterations=self.iterations,
            )  # fmt: skip
        if self.algorithm == "spectral":
            near = None
            if self.window is not None:
                if grid is None or grid[0] * grid[1] != n:
                    raise ValueError(
                        f"window={self.window} needs the places of the {n} tokens of a frame, and "
                        f"grid is {grid}"
                    )
                near = neighbourhood(frames, grid, *self.window, device=x.device)
            return spectral_clustering(
                x, k, graph=self.graph, sigma=self.sigma, near=near, distance=self.distance,
                p=self.p, iterations=self.iterations,
                neighbours=self.neighbours or auto_neighbours(frames, n),
            )  # fmt: skip
        if self.algorithm == "sparse_sampling":
            at = sparse_positions(x.shape[-2], k)
            medoids = torch.tensor(at).to(x.device, non_blocking=True)
            index = torch.arange(x.shape[-2], device=x.device)
            assign = (torch.searchsorted(medoids, index, right=True) - 1).clamp(min=0)
            return Medoids(medoids.expand(*x.shape[:-2], k), assign.expand(x.shape[:-1]))
        raise ValueError("algorithm='pooling' averages frames and has no medoids")


def segment_bounds(frames: int, segments: int) -> list[tuple[int, int]]:
    """(start, stop) of consecutive segments of frames; the last takes the remainder.

    Args:
        frames: of the video, at least 1.
        segments: at least 1, at most ``frames``.

    Raises:
        ValueError: a number is out of range.

    Source: Zhao et al. 2022, arXiv 2205.00823; the official code takes multiples only.
    """
    check_number("segments", segments, frames, "frames")
    each = frames // segments
    return [(s * each, (s + 1) * each if s < segments - 1 else frames) for s in range(segments)]


def segment_budgets(total: int, sizes: list[int]) -> list[int]:
    """Divide a budget evenly between segments, one more for the first ones where it does not go
    up; what a small segment cannot hold goes to the next.

    Args:
        total: at least the number of segments, at most the sum of the sizes.
        sizes: tokens of each segment, at least 1.

    Returns:
        At least one token per segment, at most its size; they add up to ``total`` where no earlier
        segment is larger than a later one.

    Raises:
        ValueError: ``total`` is out of range.
    """
    if not len(sizes) <= total <= sum(sizes):
        raise ValueError(
            f"total is {total}; it should be between the {len(sizes)} segments and their "
            f"{sum(sizes)} tokens"
        )
    budgets: list[int] = []
    for i, size in enumerate(sizes):
        left = total - sum(budgets)
        budgets.append(min(size, -(-left // (len(sizes) - i))))
    return budgets


def sparse_positions(n: int, k: int) -> list[int]:
    """k evenly spaced positions of n tokens: ⌊t/2 + t·j⌋ with t = n/k.

    Raises:
        ValueError: ``k`` is not between 1 and ``n``.

    Source: sparse sampling baseline of Zhao et al. 2022, official code of arXiv 2205.00823.
    """
    check_number("k", k, n)
    step = n / k
    return [int(step / 2 + step * j) for j in range(k)]


@dataclass(frozen=True, eq=False)
class Reduced:
    """Segments instead of frames."""

    #: [B, S, c + k, d]: class token (mean of the segment's), then the kept tokens by frame and
    #: place
    hidden: Tensor
    #: [B, S, k] long: frame · n + place inside the segment; None for "pooling"
    medoids: Tensor | None
    #: [B, T, n] long: cluster of every token inside its segment; None for "pooling"
    assign: Tensor | None


def segment_reduce(
    x: Tensor,
    segments: int,
    k: int,
    clusterer: Clusterer | None = None,
    *,
    aggregate: Aggregate | None = None,
    class_token: bool = True,
    grid: tuple[int, int] | None = None,
) -> Reduced:
    """Cluster all tokens of each segment of frames; one sequence per segment goes on.

    Gradients flow through the tokens that are kept or averaged, not through the choice.

    Args:
        x: [B, T, c + n, d] tokens of the frames of B videos, c = 1 with a class token in front.
        segments: S, 1 ≤ S ≤ T, of ⌊T/S⌋ frames each; the last takes the remainder.
        k: tokens of each segment, at most ⌊T/S⌋ · n; pooling keeps n.
        clusterer: None: k-medoids.
        aggregate: None keeps the medoids as they are; "mean" replaces each by the mean of its
            cluster.
        class_token: whether row 0 is one.
        grid: (height, width) of a frame, where the clusterer looks at places.

    Returns:
        ``Reduced``, ``hidden`` in the dtype of ``x``.

    Raises:
        ValueError: a number is out of range, or ``aggregate`` does not fit the algorithm.

    Source: Zhao et al. 2022, arXiv 2205.00823, section 3.
    """
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; it should be [B, T, tokens, d]")
    clusterer = clusterer or Clusterer()
    if aggregate not in (None, *get_args(Aggregate)):
        raise ValueError(f"aggregate={aggregate!r} is unknown; use None or 'mean'")
    if aggregate is not None and clusterer.algorithm in ("pooling", "sparse_sampling"):
        raise ValueError(
            f"aggregate={aggregate!r} needs clusters; algorithm={clusterer.algorithm!r} has none"
        )
    frames, n, c = x.shape[1], x.shape[2] - int(class_token), int(class_token)
    bounds = segment_bounds(frames, segments)
    limit = n if clusterer.algorithm == "pooling" else n * (bounds[0][1] - bounds[0][0])
    if not 1 <= k <= limit or (clusterer.algorithm == "pooling" and k != n):
        right = f"{n}, the tokens of a frame" if clusterer.algorithm == "pooling" else (
            f"between 1 and the {limit} tokens of a segment"
        )  # fmt: skip
        raise ValueError(f"k is {k}; it should be {right}")
    hidden, medoids, assign = [], [], []
    for group in _alike(bounds):
        first, each = group[0][0], group[0][1] - group[0][0]
        own = rearrange(x[:, first : group[-1][1]], "b (s f) n d -> b s f n d", f=each)
        lead = own[..., :c, :].mean(2)
        if clusterer.algorithm == "pooling":
            hidden.append(own.mean(2))
            continue
        tokens = rearrange(own[..., c:, :], "b s f n d -> b s (f n) d")
        found = clusterer(tokens.detach(), k, each, grid)
        kept = take_rows(tokens, found.medoids)
        if aggregate == "mean":
            kept = cluster_means(tokens, found)
        hidden.append(torch.cat([lead, kept], dim=2))
        medoids.append(found.medoids)
        assign.append(rearrange(found.assign, "b s (f n) -> b (s f) n", f=each))
    return Reduced(
        torch.cat(hidden, dim=1),
        torch.cat(medoids, dim=1) if medoids else None,
        torch.cat(assign, dim=1) if assign else None,
    )


def _alike(bounds: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Segments of one length together: all of them, or all but the last and the last."""
    if bounds[-1][1] - bounds[-1][0] == bounds[0][1] - bounds[0][0]:
        return [bounds]
    return [bounds[:-1], bounds[-1:]]


def cluster_means(x: Tensor, found: Medoids) -> Tensor:
    """Mean of the members of each cluster, in float32 (or wider) and back.

    Args:
        x: [*, n, d].
        found: clusters of the n points.

    Returns:
        [*, k, d] in the dtype of ``x``.
    """
    k = found.medoids.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # as a product with the 0/1 matrix of members: the same sums in every run, on every device
    member = torch.nn.functional.one_hot(found.assign, k).to(wide.dtype)
    return (member.mT @ wide / member.sum(-2)[..., None]).to(x.dtype)
