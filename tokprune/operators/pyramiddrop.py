"""Rank image tokens by the attention of the last prompt token and keep a share (PyramidDrop)."""

from __future__ import annotations

from torch import Tensor

from tokprune.operators.fastv import last_row_scores
from tokprune.operators.topk import segment_topk


def rank_drop(attn_row: Tensor, segment: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the image tokens that the last prompt token attends to most.

    Args:
        attn_row: [B, H, L] softmax row of the last prompt token over all keys, any float dtype.
        segment: [B, L] long, image number in 0…S−1, or −1 for text.
        budget: [B, S] long, tokens to keep of each image.

    Returns:
        (score [B, L] float32, the head mean; mask [B, L] bool, image tokens that stay). Of equal
        scores the lower position.

    Raises:
        ValueError: shapes do not match.

    Source: PyramidDrop, arXiv 2410.17247, section 3.2 and official code.
    """
    score = last_row_scores(attn_row)
    return score, segment_topk(score, segment, budget)
