"""Relevance of visual tokens to a text, as CDPruner conditions its selection on it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.checks import check_mask

__all__ = ["minmax_relevance", "text_similarity"]


def text_similarity(image: Tensor, text: Tensor) -> Tensor:
    """Mean cosine of every visual token to the vectors of a text.

    Args:
        image: [*, n, d] visual tokens of any float dtype.
        text: [m, d] or [*, m, d] vectors of the text in the same space: pooled embeddings of its
            chunks (CLIP) or its tokens.

    Returns:
        [*, n] float32 in [−1, 1]; 0 everywhere where m = 0. CDPruner takes *minus* this for CLIP
        embeddings, whose patches resemble the text more where the image does not show it.

    Raises:
        ValueError: the widths differ.

    Source: CDPruner, arXiv 2506.10967, relevance.
    """
    if image.shape[-1] != text.shape[-1]:
        raise ValueError(
            f"image has width {image.shape[-1]} and text {text.shape[-1]}; both should lie in one "
            "space"
        )
    # the mean of the cosines is the product with the mean of the unit vectors
    unit = normalize(text.float(), dim=-1).sum(-2) / max(1, text.shape[-2])
    return torch.matmul(normalize(image.float(), dim=-1), unit.unsqueeze(-1)).squeeze(-1)


def minmax_relevance(
    score: Tensor, counted: Tensor | None = None, theta: float | None = None
) -> Tensor:
    """Scores stretched to (0, 1] over their last dimension: r = (s − min + 1e-6)/(max − min).

    Args:
        score: [*, n] of any float dtype.
        counted: [*, n] bool, tokens that set minimum and maximum (and whose result means
            something); None means all.
        theta: in [0, 1): weight of relevance against diversity, r becomes exp(α·r) with
            α = θ/(2(1 − θ)); None leaves r as it is.

    Returns:
        [*, n] float32, at least 0. Where all scores are equal, r is 1 (the official code divides
        by 0).

    Raises:
        ValueError: ``theta`` out of range, or ``counted`` does not match.

    Source: CDPruner, arXiv 2506.10967; ``theta`` is a commented-out option of its code.
    """
    if theta is not None and not 0 <= theta < 1:
        raise ValueError(f"theta is {theta}; it should be in [0, 1)")
    s = score.float()
    if counted is not None:
        check_mask("counted", counted, s.shape)
    least = s if counted is None else s.masked_fill(~counted, torch.inf)
    most = s if counted is None else s.masked_fill(~counted, -torch.inf)
    low, high = least.amin(-1, keepdim=True), most.amax(-1, keepdim=True)
    span = high - low
    r = torch.where(span > 0, (s - low + 1e-6) / span, 1.0).clamp(min=0)
    return r if theta is None else torch.exp(theta / (2 * (1 - theta)) * r)
