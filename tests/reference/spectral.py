"""PiToMe's spectral distance, with the lifted graph in full: Tran et al. 2024, arXiv 2405.16148,
Eq. 3 and 5, Definitions 1 and 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distance_graph(features: Tensor) -> Tensor:
    """Weights [N, N] of the token graph, 1 − cosine, in float64; the diagonal is 0."""
    unit = F.normalize(features.double(), dim=-1)
    return (1 - unit @ unit.T).clamp(min=0).fill_diagonal_(0)


def group_means(weights: Tensor, group: Tensor) -> Tensor:
    """[n, n]: mean weight between the groups of ``group`` [N], in order of label."""
    member = F.one_hot(group.unique(return_inverse=True)[1]).double()
    size = member.sum(0)
    return member.T @ weights @ member / torch.outer(size, size)


def lifted(weights: Tensor, group: Tensor) -> Tensor:
    """[N, N]: every weight is the mean between its two groups."""
    place = group.unique(return_inverse=True)[1]
    return group_means(weights, group)[place][:, place]


def spectrum(weights: Tensor, laplacian: str = "normalized") -> Tensor:
    """Eigenvalues [N] of the Laplacian, ascending; degrees of rounding size count as 0."""
    degree = weights.sum(-1)
    if laplacian == "combinatorial":
        return torch.linalg.eigvalsh(degree.diag() - weights)
    scale = torch.where(degree > 1e-12, degree.rsqrt(), 0)
    eye = torch.eye(len(degree), dtype=weights.dtype)
    return torch.linalg.eigvalsh(eye - scale[:, None] * weights * scale)


def spectral_distance(features: Tensor, group: Tensor, laplacian: str = "normalized") -> Tensor:
    """Sum of |λ_i − λ^l_i| between the graph of tokens and its lifted coarsening."""
    weights = distance_graph(features)
    before, after = (spectrum(w, laplacian) for w in (weights, lifted(weights, group)))
    return (before - after).abs().sum()
