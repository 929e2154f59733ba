"""Token transitions: how far attention and MLP modules move a token (TransPrune)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tokprune.operators.attention import mean_rows
from tokprune.operators.checks import check_choice, check_segment

__all__ = ["image_share", "instruction_rows", "transition_score", "transition_weight"]

Normalize = Literal["sample", "batch"]
Direction = Literal["signed", "abs"]

_EPS = 1e-8


def transition_weight(
    before: Tensor,
    after: Tensor,
    valid: Tensor | None = None,
    normalize: Normalize = "sample",
    direction: Direction = "signed",
) -> Tensor:
    """Length ratio times softmax-normalised direction change of each token in one module.

    w = m·e/Σe with m = ‖after‖/‖before‖, e = exp(1 − cos(before, after)). Three sums per token
    (Σb², Σa², Σab), in float32 whatever the input dtype.

    Args:
        before: [B, L, d] what the module receives (after its norm layer).
        after: [B, L, d] what it returns (before the residual addition).
        valid: [B, L] bool, real tokens; None means all. Others weigh 0 and stay out of Σe.
        normalize: Σe over each sample's tokens, or over the whole batch as the official code does.
        direction: "signed" uses 1 − cos (official code), "abs" 1 − |cos| (paper).

    Returns:
        [B, L] float32, at least 0; 0 where ``before`` or ``after`` is a zero vector.

    Raises:
        ValueError: shapes do not match, or an unknown ``normalize`` or ``direction``.

    Source: TransPrune, arXiv 2507.20630, token transition variation.
    """
    if before.dim() < 2 or before.shape != after.shape:
        raise ValueError(
            f"after has shape {tuple(after.shape)} and before {tuple(before.shape)}; both should "
            "be [B, L, d]"
        )
    if valid is not None and valid.shape != before.shape[:-1]:
        raise ValueError(
            f"valid has shape {tuple(valid.shape)}; it should be {tuple(before.shape[:-1])}"
        )
    check_choice("normalize", normalize, Normalize)
    check_choice("direction", direction, Direction)
    before, after = before.float(), after.float()  # no copy when float32 already
    length_before = torch.linalg.vector_norm(before, dim=-1)
    length_after = torch.linalg.vector_norm(after, dim=-1)
    cosine = torch.linalg.vecdot(before, after)
    cosine = cosine / (length_before.clamp(min=_EPS) * length_after.clamp(min=_EPS))
    e = torch.exp(1 - (cosine.abs() if direction == "abs" else cosine))
    if valid is not None:
        e = e.masked_fill(~valid, 0.0)
    total = e.sum() if normalize == "batch" else e.sum(-1, keepdim=True)
    zero = length_before == 0
    ratio = (length_after / length_before.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
    weight = ratio * e / total.clamp(min=torch.finfo(torch.float32).tiny)
    return weight if valid is None else weight.masked_fill(~valid, 0.0)


def image_share(
    value: Tensor, segment: Tensor | None = None, segments: int = 1, eps: float = _EPS
) -> Tensor:
    """Divide non-negative values by their sum over the image each token belongs to.

    Args:
        value: [..., L] of any float dtype; two dimensions with ``segment``.
        segment: [B, L] long, image number in 0…segments−1 or −1 outside images; None means that
            every entry belongs to one image.
        segments: number of images per row at most.
        eps: added to each sum.

    Returns:
        [..., L] float32; 0 where ``segment`` is −1.

    Raises:
        ValueError: ``segment`` does not match ``value`` [B, L].

    Source: TransPrune, arXiv 2507.20630, official code; per image is ours.
    """
    value = value.float()
    if segment is None:
        return value / (value.sum(-1, keepdim=True) + eps)
    check_segment(segment, "value", value)
    bins = segment + 1
    sums = value.new_zeros(value.shape[0], segments + 1).scatter_add_(1, bins, value)
    return (value / (sums.gather(1, bins) + eps)).masked_fill(segment < 0, 0.0)


def instruction_rows(
    probs: Tensor, row_valid: Tensor | None = None, segment: Tensor | None = None, segments: int = 1
) -> Tensor:
    """Instruction-guided attention from attention rows of the text after the images.

    Args:
        probs: [B, H, R, L] softmax rows over all keys.
        row_valid: [B, R] bool, rows that count; None means all.
        segment: [B, L] long, image number or −1; None means every key is an image token.
        segments: number of images per row at most.

    Returns:
        [B, L] float32, mean over heads and rows, divided by its sum over each image; 0 outside
        images and in samples without a row.

    Raises:
        ValueError: shapes do not match.

    Source: TransPrune, arXiv 2507.20630, instruction-guided attention.
    """
    return image_share(mean_rows(probs, row_valid), segment, segments)


def transition_score(
    ttv: Sequence[Tensor],
    iga: Tensor | None,
    alpha: float = 0.5,
    segment: Tensor | None = None,
    segments: int = 1,
) -> Tensor:
    """Score of image tokens: α · transition share + (1 − α) · instruction attention.

    The official code adds the two with weight 1 each, the order of α = 0.5.

    Args:
        ttv: transition weights [..., L] of the accumulated layers, alive tokens only; may be
            empty, then the share is 0.
        iga: [..., L] from ``instruction_rows``; None counts as 0.
        alpha: weight of the transitions, in [0, 1].
        segment, segments: as in ``image_share``; None means that all L entries are one image.

    Returns:
        [..., L] float32; 0 where ``segment`` is −1.

    Raises:
        ValueError: ``alpha`` outside [0, 1], or neither ``ttv`` nor ``iga`` given.

    Source: TransPrune, arXiv 2507.20630, combined score.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it should be between 0 and 1")
    if not ttv and iga is None:
        raise ValueError("ttv is empty and iga is None; at least one of them should be given")
    score = None
    if ttv:
        total = torch.stack([weight.float() for weight in ttv]).sum(0)
        score = alpha * image_share(total, segment, segments)
    if iga is not None:
        part = (1 - alpha) * iga.float()
        if segment is not None:
            part = part.masked_fill(segment < 0, 0.0)
        score = part if score is None else score + part
    assert score is not None
    return score
