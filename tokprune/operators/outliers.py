"""Values that stand out of their row, by the upper fence of its box plot."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["outliers"]


def outliers(values: Tensor, factor: float = 1.5) -> Tensor:
    """Values above Q3 + factor · (Q3 − Q1), strictly.

    Args:
        values: [*, n] of any float dtype; the arithmetic is float32, quartiles are interpolated.
        factor: of the range between the quartiles.

    Returns:
        [*, n] bool.

    Source: how many there are is how many tokens LLaVA-PruMerge (arXiv 2403.15388, attention) and
    TRIM (arXiv 2409.10994, probabilities) keep.
    """
    values = values.float()
    ordered = values.sort(-1).values
    first, third = (_quantile(ordered, share) for share in (0.25, 0.75))
    return values > (third + factor * (third - first))[..., None]


def _quantile(ordered: Tensor, share: float) -> Tensor:
    place = (ordered.shape[-1] - 1) * share
    low = int(place)
    high = min(low + 1, ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., low], ordered[..., high], place - low)
