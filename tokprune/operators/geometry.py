"""Centred geometry: similarities around the mean token, and how unlike the others a token is."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.checks import check_choice, check_points, check_selection

__all__ = ["Geometry", "WeightNorm", "centred_geometry"]

WeightNorm = Literal["minmax", "sigmoid"]

_EPS = 1e-6


class Geometry(NamedTuple):
    """What :func:`centred_geometry` finds, float32."""

    #: [*, n, d] rows around their mean: their cosines are the centred similarities
    centred: Tensor
    #: [*, n] minus the mean cosine to all others, before centring
    distinctiveness: Tensor
    #: [*, n] the same in [0, 1]
    weight: Tensor


@torch.no_grad()
def centred_geometry(
    x: Tensor, standardise: bool = False, norm: WeightNorm = "minmax",
    candidates: Tensor | None = None, eps: float = _EPS,
) -> Geometry:  # fmt: skip
    """Rows around their mean, and the weight of each row from where it lies before that.

    No N×N matrix is made: the mean cosine to all others is a product with the sum of the unit rows.

    Args:
        x: [*, n, d] token features of any float dtype; the arithmetic is float32.
        standardise: divide every dimension by its standard deviation over the rows first;
            dimensions that do not vary are left out (ours: they would outweigh all others).
        norm: of the weight: "minmax" or "sigmoid" (of the standard score), over the rows.
        candidates: [*, n] bool, rows that count; None means all. What the others hold, NaN
            included, plays no part, and what comes out for them means nothing.
        eps: keeps divisions finite; the source gives no value.

    Raises:
        ValueError: shapes or dtypes do not match, or an unknown ``norm``.

    Source: "Centering before Pruning", arXiv 2608.30263v1, centred similarity and distinctiveness.
    """
    check_points(x)
    check_selection(x.shape[:-1], 1, candidates)
    check_choice("norm", norm, WeightNorm)
    y = x.float()
    real = y.new_ones(y.shape[:-1]) if candidates is None else candidates.float()
    if candidates is not None:
        y = y.masked_fill(~candidates[..., None], 0.0)
    count = real.sum(-1, keepdim=True).clamp(min=1)
    mean = y.sum(-2, keepdim=True) / count[..., None]
    apart = (y - mean) * real[..., None]
    if standardise:
        variance = apart.square().sum(-2, keepdim=True) / count[..., None]
        varies = _varies(y, real)
        scale = torch.where(varies, (variance + eps).rsqrt(), 0.0)
        y, apart = y * scale, apart * scale
    unit = normalize(y, dim=-1)
    others = torch.matmul(unit, unit.sum(-2).unsqueeze(-1)).squeeze(-1) - unit.square().sum(-1)
    g = -others / (count - 1).clamp(min=1)
    return Geometry(apart, g, _weight(g, real, count, norm, eps))


def _varies(y: Tensor, real: Tensor) -> Tensor:
    """[*, 1, d] bool: dimensions that are not the same in all rows that count."""
    outside = real[..., None] == 0
    low = y.masked_fill(outside, torch.inf).amin(-2, keepdim=True)
    return y.masked_fill(outside, -torch.inf).amax(-2, keepdim=True) > low


def _weight(g: Tensor, real: Tensor, count: Tensor, norm: WeightNorm, eps: float) -> Tensor:
    outside = real == 0
    if norm == "minmax":
        low = g.masked_fill(outside, torch.inf).amin(-1, keepdim=True)
        high = g.masked_fill(outside, -torch.inf).amax(-1, keepdim=True)
        return (g - low) / (high - low + eps)
    mean = (g * real).sum(-1, keepdim=True) / count
    spread = (((g - mean) * real).square().sum(-1, keepdim=True) / count).sqrt()
    return torch.sigmoid((g - mean) / (spread + eps))
