"""Normalised spectral clustering of video tokens, with medoids that name the clusters."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from tokprune.operators.checks import (
    check_choice,
    check_mask,
    check_number,
    check_points,
    check_square,
)
from tokprune.operators.kmedoids import ITERATIONS, Distance, Medoids, kmedoids, pairwise

__all__ = [
    "Graph", "affinity", "auto_neighbours", "neighbourhood", "spectral_clustering",
    "spectral_embedding",
]  # fmt: skip

Graph = Literal["knn", "heat"]


@torch.no_grad()
def spectral_clustering(
    x: Tensor,
    k: int,
    *,
    graph: Graph = "knn",
    neighbours: int = 15,
    sigma: float | None = 2.0,
    near: Tensor | None = None,
    distance: Distance = "euclidean",
    p: float = 2.0,
    iterations: int = ITERATIONS,
) -> Medoids:
    """k-medoids on the rows of the graph's spectral embedding; the medoids index ``x``.

    Where the graph falls into more than k nearly separate parts, equal eigenvalues leave the
    choice of eigenvectors, and with it the clusters, to the eigensolver.

    Args:
        x: [*, n, d] of any float dtype.
        k: clusters, 1 ≤ k ≤ n.
        graph, neighbours, sigma, near: see :func:`affinity`.
        distance, p, iterations: of the k-medoids, see :func:`tokprune.operators.kmedoids`.

    Returns:
        ``Medoids`` with shapes [*, k] and [*, n], clusters numbered by medoid.

    Raises:
        ValueError: an argument is out of range.

    Source: Zhao et al. 2022, arXiv 2205.00823, section 3.3.
    """
    weights = affinity(x, graph=graph, neighbours=neighbours, sigma=sigma, near=near)
    rows = spectral_embedding(weights, k)[1]
    return kmedoids(
        rows, k, distance=distance, p=p, pre_norm=True, iterations=iterations
    )  # rows have unit length already, so their order of length is rounding: as with pre_norm


def affinity(
    x: Tensor,
    *,
    graph: Graph = "knn",
    neighbours: int = 15,
    sigma: float | None = 2.0,
    near: Tensor | None = None,
) -> Tensor:
    """Weights exp(−‖x_i − x_j‖² / (2σ²)) of the token graph.

    Args:
        x: [*, n, d] of any float dtype.
        graph: ``heat`` keeps all pairs; ``knn`` those where one of the two is among the
            ``neighbours`` closest of the other, itself counted (all of them at n or more).
        neighbours: at least 1; :func:`auto_neighbours` has the published number.
        sigma: width σ > 0; 2 is published, for CLIP-B inside. Where tokens lie many σ apart all
            weights vanish and the clusters mean nothing; None takes half the root mean square of
            a sample's distances.
        near: [n, n] bool, pairs that may be linked (see :func:`neighbourhood`); None: all.

    Returns:
        [*, n, n] float32, symmetric, 1 on the diagonal.

    Raises:
        ValueError: an argument is out of range or does not fit.

    Source: Zhao et al. 2022, arXiv 2205.00823, section 3.3 and official code.
    """
    check_choice("graph", graph, Graph)
    check_points(x)
    n = x.shape[-2]
    if neighbours < 1:
        raise ValueError(f"neighbours is {neighbours}; it should be at least 1")
    if sigma is not None and not sigma > 0:
        raise ValueError(f"sigma is {sigma}; it should be positive, or None")
    if near is not None:
        check_mask("near", near, (n, n))
    square = pairwise(rearrange(x, "... n d -> (...) n d").float()).square()
    width: float | Tensor = 0.0 if sigma is None else sigma**2
    if sigma is None:  # no spread at all: every token is every other's equal
        width = square.mean((1, 2), keepdim=True).clamp(min=torch.finfo(square.dtype).tiny) / 4
    weights = torch.exp(-square / (2 * width))
    if graph == "knn" and neighbours < n:
        least = weights.topk(neighbours, dim=-1).values[..., -1:]
        weights = weights.masked_fill((weights < least) & (weights < least.mT), 0.0)
    if near is not None:
        weights = weights.masked_fill(~near, 0.0)
    return weights.reshape(*x.shape[:-1], n)


def spectral_embedding(weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the k smallest eigenvalues of the normalised Laplacian, rows scaled to one.

    The arithmetic is float64 (float32 on devices without it): eigenvectors are as uncertain as
    rounding is large against the gaps between eigenvalues. On CUDA the solver waits for the device.

    Args:
        weights: [*, n, n] symmetric, every row with a positive sum.
        k: columns, 1 ≤ k ≤ n.

    Returns:
        All eigenvalues [*, n], ascending, and rows [*, n, k], both float32. Columns may be turned
        or flipped where eigenvalues are equal; products of rows do not depend on it.

    Raises:
        ValueError: ``weights`` is not square or ``k`` out of range.

    Source: Ng et al. 2001; Zhao et al. 2022, arXiv 2205.00823, section 3.3.
    """
    check_square("weights", weights)
    check_number("k", k, weights.shape[-1], "points")
    wide = weights.to(torch.float32 if weights.device.type == "mps" else torch.float64)
    scale = wide.sum(-1).rsqrt()
    laplacian = -scale[..., :, None] * wide * scale[..., None, :]
    laplacian.diagonal(0, -2, -1).add_(1.0)
    values, vectors = torch.linalg.eigh(laplacian)
    rows = vectors[..., :k]
    unit = rows / (torch.linalg.vector_norm(rows, dim=-1, keepdim=True) + 1e-6)
    return values.float(), unit.float()


def auto_neighbours(frames: int, tokens_per_frame: int) -> int:
    """Neighbours of the published k-nearest-neighbour graphs: 5 for every frame of a segment, and
    5 more for frames of 100 tokens or more.

    Source: Zhao et al. 2022, official code of arXiv 2205.00823.
    """
    return 5 * frames + (5 if tokens_per_frame >= 100 else 0)


def neighbourhood(
    frames: int,
    grid: tuple[int, int],
    spatial: int,
    temporal: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Pairs of tokens that lie near each other in space and time.

    Args:
        frames: frames of a segment.
        grid: (height, width) of a frame.
        spatial: width of the window in cells: rows and columns differ by at most half of it.
        temporal: width of the window in frames.
        device: of the result.

    Returns:
        [n, n] bool for n = frames · height · width tokens, frame by frame in raster order.

    Source: Zhao et al. 2022, official code of arXiv 2205.00823 (9 cells for frames of fewer than
    100 tokens, else 19; 7 frames; off in the published runs).
    """
    axes = [torch.arange(size, device=device) for size in (frames, *grid)]
    place = torch.cartesian_prod(*axes)
    reach = torch.tensor([temporal // 2, spatial // 2, spatial // 2], device=device)
    return ((place[:, None] - place[None, :]).abs() <= reach).all(-1)
