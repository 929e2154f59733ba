"""How much a merge changes the spectrum of the token graph: a diagnostic, not a ranking."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Laplacian = Literal["normalized", "combinatorial"]


def spectral_distance(
    features: Tensor, group: Tensor, laplacian: Laplacian = "normalized"
) -> Tensor:
    """Sum of |λ_i − λ^l_i| between the graph of tokens and its lifted coarsening.

    Compare only partitions with the same number of groups. Over several merges take the features
    before the first one and the composed group ids.

    Args:
        features: [N, d] tokens before the merge, any float dtype.
        group: [N] long, the group of each token (any non-negative labels).
        laplacian: ``normalized`` or ``combinatorial`` (D − W).

    Returns:
        0-dimensional float64 on the CPU.

    Raises:
        ValueError: shapes do not fit, a negative label, unknown ``laplacian``.

    Source: Tran et al. 2024, arXiv 2405.16148, Eq. 3 and 5, Definitions 1 and 2.
    """
    before, after = spectra(features, group, laplacian)
    return (before - after).abs().sum()


def spectra(
    features: Tensor, group: Tensor, laplacian: Laplacian = "normalized"
) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the token graph and of its lifted coarsening, both ascending.

    The lifted N×N graph is never built. Vectors that sum to zero inside one group are
    eigenvectors: N − n of the eigenvalues are 1 (normalised) or the lifted degree of the group.
    The other n belong to an n×n matrix of sum-coarsened weights.

    Args, Raises and Source as :func:`spectral_distance`.

    Returns:
        λ [N] and λ^l [N], float64 on the CPU.
    """
    if laplacian not in get_args(Laplacian):
        raise ValueError(f"laplacian={laplacian!r} is unknown; use one of {get_args(Laplacian)}")
    weights = distance_graph(features)
    coarse, size = coarsen(weights, group)
    degree = coarse.sum(-1)
    if laplacian == "normalized":
        inside = torch.ones_like(degree)
        full = _normalized(weights)
        small = _normalized(coarse)
    else:
        inside = degree / size
        full = weights.sum(-1).diag() - weights
        small = inside.diag() - coarse / torch.outer(size, size).sqrt()
    after = torch.cat([torch.linalg.eigvalsh(small), inside.repeat_interleave(size.long() - 1)])
    return torch.linalg.eigvalsh(full), after.sort().values


def distance_graph(features: Tensor) -> Tensor:
    """Weights W [N, N] of the token graph, 1 − cosine, in float64 on the CPU; the diagonal is 0.

    Raises:
        ValueError: ``features`` is not [N, d].

    Source: Tran et al. 2024, arXiv 2405.16148, section 3.2.
    """
    if features.ndim != 2:
        raise ValueError(f"features has shape {tuple(features.shape)}; it must be [N, d]")
    unit = F.normalize(features.detach().to("cpu", torch.float64), dim=-1)
    return (1 - unit @ unit.T).clamp_min_(0).fill_diagonal_(0)


def coarsen(weights: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of weights between groups.

    Args:
        weights: [N, N] float64.
        group: [N] long.

    Returns:
        [n, n] sums, self-weights of groups included, and the group sizes [n] in float64; groups
        in ascending order of label.

    Raises:
        ValueError: ``group`` is not [N] or holds a negative label.
    """
    if group.shape != weights.shape[:1]:
        raise ValueError(
            f"group has shape {tuple(group.shape)}; it must be [{weights.shape[0]}], one label a "
            "token"
        )
    group = group.cpu()
    if (group < 0).any():
        raise ValueError(
            "group holds −1: some token was dropped; give it a group with assign_dropped"
        )
    member = F.one_hot(group.unique(return_inverse=True)[1]).to(weights)
    return member.T @ weights @ member, member.sum(0)


def assign_dropped(features: Tensor, keep: Tensor) -> Tensor:
    """Groups for a method that drops tokens: each joins the most similar kept token.

    Our extension of the spectral distance; the paper defines it for merges only.

    Args:
        features: [N, d].
        keep: [K] long, distinct kept tokens.

    Returns:
        [N] long: the index into ``keep`` of each token's group.

    Raises:
        ValueError: ``features`` is not [N, d]; ``keep`` is not [K] with K ≥ 1.
    """
    if features.ndim != 2:
        raise ValueError(f"features has shape {tuple(features.shape)}; it must be [N, d]")
    if keep.ndim != 1 or keep.numel() == 0:
        raise ValueError(f"keep has shape {tuple(keep.shape)}; it must be [K] with K ≥ 1")
    unit = F.normalize(features.detach().double(), dim=-1)
    group = (unit @ unit[keep].T).argmax(-1)
    return group.scatter(0, keep, torch.arange(keep.numel(), device=keep.device))


def _normalized(weights: Tensor) -> Tensor:
    """I − D^(−½) W D^(−½), where degrees of rounding size (below 1e-12) count as zero."""
    degree = weights.sum(-1)
    scale = torch.where(degree > 1e-12, degree.rsqrt(), 0)
    return torch.eye(len(degree), dtype=weights.dtype) - scale[:, None] * weights * scale
