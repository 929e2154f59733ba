"""How much a decoder layer changed each token (V²Drop)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["variation"]


def variation(before: Tensor, after: Tensor) -> Tensor:
    """Euclidean length of the change of every token from one layer's input to the next one's.

    Always in float32: the massive entries that a few tokens have would overflow half precision
    when squared.

    Args:
        before: [..., L, D] hidden states that entered a layer, any float dtype.
        after: [..., L, D] hidden states of the same tokens that enter the layer after it.

    Returns:
        [..., L] float32, at least 0.

    Raises:
        ValueError: shapes differ.

    Source: V²Drop, arXiv 2509.01552, L2 distance between consecutive layers.
    """
    if before.dim() < 2 or before.shape != after.shape:
        raise ValueError(
            f"after has shape {tuple(after.shape)} and before {tuple(before.shape)}; both should "
            "be [..., L, D]"
        )
    return torch.linalg.vector_norm(after.float() - before.float(), dim=-1)
