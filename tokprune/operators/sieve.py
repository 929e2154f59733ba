"""What the text's hidden states do not explain of visual tokens, and a choice by it (SIEVE)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.checks import check_mask, check_number, check_segment
from tokprune.operators.diversity import DENSE_LIMIT, row_getter
from tokprune.operators.topk import rank

__all__ = ["TextResidual", "strongest_heads", "text_residual", "unexplained_and_diverse"]


class TextResidual(NamedTuple):
    """What :func:`text_residual` finds, float32."""

    #: [B, n, d] visual tokens around the mean of the text, less their projection on the text
    residual: Tensor
    #: [B, n] length of the residual by length of the token, both around the mean of the text
    ratio: Tensor
    #: [B] ridge of the projection
    ridge: Tensor


def strongest_heads(
    received: Tensor, heads: int, segment: Tensor | None = None, images: int = 1
) -> tuple[Tensor, Tensor]:
    """Attention that tokens get from the heads which give their image most, summed over them.

    Args:
        received: [B, H, L] attention that each token gets in each head, summed over the rows that
            count; the arithmetic is float32.
        heads: number of heads, 1 … H.
        segment: [B, L] long, number of the image of each token, −1 where it is in none; None: one
            image.
        images: S, more than the largest number in ``segment``.

    Returns:
        (heads [B, S, heads] long, ascending; sums [B, L] float32, 0 at tokens of no image). Of
        equal heads the lower number.

    Raises:
        ValueError: ``heads`` out of range, or shapes do not match.

    Source: SIEVE, arXiv 2608.10489, text-guided attention; several images are ours.
    """
    if received.dim() != 3:
        raise ValueError(f"received has shape {tuple(received.shape)}; it should be [B, H, L]")
    check_number("heads", heads, received.shape[1], "heads")
    received = received.float()
    if segment is None:
        segment = torch.zeros_like(received[:, 0], dtype=torch.long)
    check_segment(segment, "received[:, 0]", received[:, 0])
    member = segment[:, None] == torch.arange(images, device=segment.device)[:, None]
    mass = torch.bmm(member.float(), received.mT)
    chosen = rank(mass)[..., :heads].sort(-1).values
    used = torch.zeros_like(mass).scatter(2, chosen, 1.0)
    own = used.gather(1, segment.clamp(min=0)[..., None].expand(-1, -1, mass.shape[2]))
    return chosen, (received.mT * own).sum(-1).masked_fill(segment < 0, 0.0)


@torch.no_grad()
def text_residual(
    visual: Tensor, text: Tensor, energy: float = 0.75, eps: float = 1e-6,
    words: Tensor | None = None,
) -> TextResidual:  # fmt: skip
    """Ridge projection of visual tokens on the span of the text's, all around the text's mean.

    The ridge is the squared singular value of the text at which the largest ones reach a share
    ``energy`` of all, plus ``eps``. It comes from the M×M products of the text with itself, whose
    eigenvalues CUDA looks up by a call that waits for the device.

    Args:
        visual: [B, n, d] of any float dtype; the arithmetic is float32.
        text: [B, M, d], M ≥ 1. A single token spans nothing: nothing is explained.
        energy: share η, in (0, 1].
        eps: above 0.
        words: [B, M] bool, text that is there; None means all. What the rest holds plays no part.

    Returns:
        A ``TextResidual``; the ratio of a token that is the text's mean itself is 0.

    Raises:
        ValueError: a number is out of range, or shapes or dtypes do not match.

    Source: SIEVE, arXiv 2608.10489, cross-modal residual; eps is ours.
    """
    shapes = visual.dim() == text.dim() == 3 and visual.shape[::2] == text.shape[::2]
    if not shapes or not text.shape[1]:
        raise ValueError(
            f"visual has shape {tuple(visual.shape)} and text {tuple(text.shape)}; they should be "
            "[B, n, d] and [B, M, d] with M at least 1"
        )
    if not (0 < energy <= 1 and eps > 0):
        raise ValueError(f"energy is {energy} and eps {eps}; they should be in (0, 1] and above 0")
    spread, own = text.float(), visual.float()
    if words is None:
        mean = spread.mean(1, keepdim=True)
        spread = spread - mean
    else:
        check_mask("words", words, text.shape[:2])
        unreal = ~words[..., None]
        count = words.sum(1).clamp(min=1)[:, None, None]
        mean = spread.masked_fill(unreal, 0.0).sum(1, keepdim=True) / count
        spread = (spread - mean).masked_fill(unreal, 0.0)
    own = own - mean
    values, vectors = torch.linalg.eigh(spread @ spread.mT)
    values = values.clamp(min=0)
    falling = values.flip(-1)
    reached = falling.cumsum(-1)
    last = (reached < float(energy) * reached[:, -1:]).sum(-1, keepdim=True)
    ridge = falling.gather(1, last) + float(eps)
    weights = (own @ spread.mT) @ (vectors / (values + ridge)[:, None]) @ vectors.mT
    residual = own - weights @ spread
    length = own.norm(dim=-1)
    ratio = residual.norm(dim=-1) / length.masked_fill(length == 0, 1.0)
    return TextResidual(residual, ratio, ridge[:, 0])


@torch.no_grad()
def unexplained_and_diverse(residual: Tensor, ratio: Tensor, attention: Tensor, k: int) -> Tensor:
    """Greedy choice by (attention · ratio)², discounted by what the chosen tokens already say.

    Each step takes the largest score that is left and multiplies all others by 1 − cos² of their
    residual and that of the token taken. Prefixes nest: the first j entries are the result for
    k = j. Scores are held relative to the best one, so that hundreds of discounts do not
    underflow. No host synchronisation; above 8192 tokens one row of cosines is made per step.

    Args:
        residual: [B, n, d] from :func:`text_residual`.
        ratio: [B, n], from there.
        attention: [B, n], at least 0; its scale does not matter.
        k: tokens to choose, 1 ≤ k ≤ n.

    Returns:
        LongTensor [B, k], order of the choice; of equal scores the lower index.

    Raises:
        ValueError: ``k`` out of range, or shapes do not match.

    Source: SIEVE, arXiv 2608.10489, selection.
    """
    batch = residual.shape[:-1]
    if residual.dim() != 3 or ratio.shape != batch or attention.shape != batch:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, ratio {tuple(ratio.shape)} and attention "
            f"{tuple(attention.shape)}; they should be [B, n, d] and twice [B, n]"
        )
    check_number("k", k, residual.shape[1])
    unit = normalize(residual.float(), dim=-1)
    if dense := k > 1 and residual.shape[1] <= DENSE_LIMIT:
        rows = row_getter(_left(torch.bmm(unit, unit.mT)))
    else:
        rows = row_getter(unit)
    score = (_relative(attention.float()) * _relative(ratio.float())).square()
    taken = torch.zeros_like(score, dtype=torch.bool)
    order: list[Tensor] = []
    while True:
        pick = score.masked_fill(taken, -1.0).argmax(-1)
        order.append(pick)
        if len(order) == k:
            return torch.stack(order, 1)
        taken = taken.scatter(1, pick[:, None], True)
        row = rows(pick)
        left = row if dense else _left(torch.bmm(unit, row[..., None]).squeeze(-1))
        score = _relative((score * left).masked_fill(taken, 0.0))


def _left(cosine: Tensor) -> Tensor:
    """1 − cos², in place; not below 0, whatever the rounding."""
    return cosine.square_().neg_().add_(1).clamp_(min=0)


def _relative(score: Tensor) -> Tensor:
    """By the largest of each row; rows of zeros stay as they are."""
    best = score.amax(-1, keepdim=True)
    return score / best.masked_fill(best == 0, 1.0)
