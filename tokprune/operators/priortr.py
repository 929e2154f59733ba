"""How much more the question looks at a token than text that has not seen it (PriorTR)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.operators.checks import check_mask, check_segment
from tokprune.operators.transition import image_share

__all__ = ["null_rows", "prior_corrected"]

_EPS = 1e-10


def null_rows(segment: Tensor, text: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """The first text after each image, which sees the image and nothing that is asked of it.

    Args:
        segment: [B, L] long, image number in 0…segments−1, or −1 outside images.
        text: [B, L] bool, real text.
        segments: number of images per row at most.

    Returns:
        Index [B, segments] long, and bool [B, segments], whether there is such a row (0 and False
        for images that are not there or that no text follows).

    Raises:
        ValueError: shapes or dtypes do not match.

    Source: PriorTR, arXiv 2606.24156, the null token; several images are ours.
    """
    check_mask("text", text, segment.shape)
    length = segment.shape[1]
    arange = torch.arange(length, device=segment.device)
    place = torch.where(text, arange, length)
    # the first text at or behind each place, and behind the last one
    following = place.flip(1).cummin(1).values.flip(1)
    following = torch.nn.functional.pad(following, (0, 1), value=length)
    end = segment.new_full((len(segment), segments + 1), -1)
    end = end.scatter_reduce(1, segment + 1, arange.expand_as(segment), "amax")[:, 1:]
    index = following.gather(1, end + 1)
    real = (end >= 0) & (index < length)
    return index.masked_fill(~real, 0), real


def prior_corrected(
    question: Tensor, prior: Tensor, segment: Tensor | None = None, segments: int = 1,
    eps: float = _EPS,
) -> Tensor:  # fmt: skip
    """P · log(P / Q): what the question adds to the attention that a token gets anyway.

    Both attentions are made shares of their image first. Below 0 where the question looks less at
    a token than the prior does.

    Args:
        question: [..., L] attention of the question to each token, P, of any float dtype; two
            dimensions with ``segment``.
        prior: [..., L] attention of text that has not seen the question, Q.
        segment: [B, L] long, image number or −1; None means that all L entries are one image.
        segments: number of images per row at most.
        eps: added to sums and inside the logarithm (1e-10 as the official code; paper 1e-6).

    Returns:
        [..., L] float32; 0 where ``segment`` is −1.

    Raises:
        ValueError: shapes do not match.

    Source: PriorTR, arXiv 2606.24156, official code; shares of each image are ours.
    """
    if question.shape != prior.shape:
        raise ValueError(
            f"question has shape {tuple(question.shape)} and prior {tuple(prior.shape)}; both "
            "should be the same"
        )
    if segment is not None:
        check_segment(segment, "question", question)
    p = image_share(question, segment, segments, eps)
    q = image_share(prior, segment, segments, eps)
    return (p * ((p + eps) / (q + eps)).log()).nan_to_num(0.0, 1e6, -1e6)
