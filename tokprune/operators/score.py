"""Weighted farthest-first: patches that lie far from those chosen and are salient (SCoRe)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.operators.checks import check_selection
from tokprune.operators.diversity import k_center

__all__ = ["salient_k_center"]


@torch.no_grad()
def salient_k_center(
    x: Tensor, saliency: Tensor, k: int, alpha: float = 0.8, candidates: Tensor | None = None
) -> Tensor:
    """The most salient token first, then always the one for which the cosine distance to the
    nearest chosen token, times saliency ** alpha, is largest.

    With alpha = 0 that is farthest-first from the most salient token; the larger alpha is, the
    closer to the k most salient ones. Prefixes nest: the first j entries are the result for k = j.

    Args:
        x: [*, n, d] token features of any float dtype; the arithmetic is float32.
        saliency: [*, n], at least 0, of any float dtype; its scale does not matter. Tokens of 0
            come last, with exact copies of chosen ones, unless alpha is 0.
        k: tokens to choose, 1 ≤ k ≤ n. Rows with fewer than k candidates give repeated indices.
        alpha: exponent, at least 0.
        candidates: [*, n] bool, tokens that may be chosen; None means all.

    Returns:
        LongTensor [*, k], selection order; of equal products the lower index.

    Raises:
        ValueError: ``k`` or ``alpha`` out of range, or shapes or dtypes do not match.

    Source: "Salience-Coverage Reduction for Vision Token Pruning" (SCoRe), CVPR 2026.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha}; it should be at least 0")
    if saliency.shape != x.shape[:-1]:
        raise ValueError(
            f"saliency has shape {tuple(saliency.shape)}; it should be {tuple(x.shape[:-1])}, one "
            "number per token"
        )
    check_selection(x.shape[:-1], k, candidates)
    own = saliency.to(x.device).float()
    first = own if candidates is None else own.masked_fill(~candidates, -1.0)
    own = own if candidates is None else own.masked_fill(~candidates, 0.0)
    # against the largest, so that no large exponent makes 0 of all
    most = own.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return k_center(x, k, first.argmax(-1), candidates, (own / most).pow(float(alpha)))
