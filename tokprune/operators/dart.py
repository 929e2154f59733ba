"""DART: a few pivot tokens, and for each of them the image tokens that resemble it least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.checks import check_mask
from tokprune.operators.rows import take_rows
from tokprune.operators.topk import rank

__all__ = ["PivotOrder", "Retained", "key_norms"]

PivotOrder = Literal["official", "norm"]


@dataclass(frozen=True)
class Retained:
    """What stays of each image, and its pivots; −1 marks pivots that there are not."""

    #: [B, S, L] bool: tokens of each image that stay
    mask: Tensor
    #: [B, S, V] long, by falling norm
    image_pivots: Tensor
    #: [B, S, T] long, by falling norm
    text_pivots: Tensor
    #: [B, S, V + T] long: all pivots as they were visited
    order: Tensor


def key_norms(keys: Tensor) -> Tensor:
    """‖k‖₁ of every token over all heads.

    Args:
        keys: [B, H, L, d] after rotary, of any float dtype; sums are float32. Whether heads are
            repeated for grouped queries changes a factor only.

    Returns:
        [B, L] float32.

    Source: DART, arXiv 2502.11494, pivots by K-norm; ZichenWen1/DART.
    """
    return keys.float().abs().sum((1, 3))


@torch.no_grad()
def dart(
    norms: Tensor,
    hidden: Tensor,
    image: Tensor,
    text: Tensor,
    keep: Tensor,
    image_pivots: int = 4,
    text_pivots: int = 4,
    pivot_order: PivotOrder = "norm",
    place: Tensor | None = None,
    centre: bool = False,
) -> Retained:
    """Image pivots stay; then every pivot in turn takes its share of the image tokens that are
    still free, those of the smallest cosine to it first. Text pivots only vote.

    A budget of k tokens leaves ⌊(k − V)/(V + T)⌋ to each pivot and one more to the first ones
    until all are given. Images with fewer tokens than pivots, or a budget below V, have fewer
    pivots.

    Args:
        norms: [B, L] from :func:`key_norms`.
        hidden: [B, L, D] of any float dtype; cosines are float32.
        image: [B, S, L] bool, the tokens of each image (none: that image is not there).
        text: [B, S, L] bool, tokens that may become text pivots of each image.
        keep: [B, S] long, tokens to retain of each image, pivots included.
        image_pivots: V, at least 1.
        text_pivots: T, at least 0.
        pivot_order: in which pivots choose, which matters as nothing is taken twice: "norm":
            image pivots then text pivots, each by falling norm; "official": the order in which
            CPython iterates a ``set`` of the pivots' places, as the official code does. That needs
            one copy of V + T numbers per image to the host.
        place: [B, L] long, the tokens' places for that set; None means 0…L−1. Give places that
            do not count padding.
        centre: compare tokens around the mean of their image's ("Centering before Pruning",
            arXiv 2608.30263; ours for DART).

    Raises:
        ValueError: shapes or dtypes do not match, or a number of pivots is out of range.

    Source: DART, arXiv 2502.11494, and its code, ZichenWen1/DART.
    """
    _check(norms, hidden, image, text, keep, image_pivots, text_pivots)
    length = norms.shape[1]
    count = image.sum(-1)
    keep = torch.minimum(keep.to(count.device), count)
    chosen, chosen_real = _top(norms, image, min(image_pivots, length), keep)
    voting, voting_real = _top(norms, text, min(text_pivots, length), text.sum(-1))
    pivots, real = torch.cat([chosen, voting], -1), torch.cat([chosen_real, voting_real], -1)
    if pivot_order == "official":
        turn = _set_order(pivots, real, place)
        pivots, real = pivots.gather(-1, turn), real.gather(-1, turn)

    left = keep - chosen_real.sum(-1)
    share = left[..., None] // real.sum(-1, keepdim=True).clamp(min=1)
    rest = left[..., None] - share * real.sum(-1, keepdim=True)
    share = torch.where(real, share + (real.cumsum(-1) <= rest), 0)

    x = hidden.float()
    asking = take_rows(x, pivots.flatten(1))
    if centre:
        member = image.float()
        mean = torch.bmm(member, x) / count.clamp(min=1)[..., None]
        asking = asking - mean.repeat_interleave(pivots.shape[-1], dim=1)
        x = x - torch.bmm(member.transpose(1, 2), mean)
    cosine = torch.bmm(normalize(asking, dim=-1), normalize(x, dim=-1).transpose(1, 2))
    cosine = rearrange(cosine, "b (s p) l -> b s p l", p=pivots.shape[-1])

    mask = torch.zeros_like(image).scatter(-1, chosen, chosen_real)
    free = image & ~mask
    arange = torch.arange(length, device=image.device)
    for g in range(pivots.shape[-1]):
        near = cosine[:, :, g].masked_fill(~free, torch.inf)
        by_cosine = near.sort(dim=-1, stable=True).indices
        taken = torch.zeros_like(free).scatter(-1, by_cosine, arange < share[..., g, None])
        mask, free = mask | taken, free & ~taken

    def named(index: Tensor, there: Tensor) -> Tensor:
        return index.masked_fill(~there, -1)

    return Retained(
        mask, named(chosen, chosen_real), named(voting, voting_real), named(pivots, real)
    )


def _top(norms: Tensor, among: Tensor, most: int, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The ``most`` largest norms [B, S, most] of the tokens in ``among``, and which of them are
    real: at most ``limit`` [B, S], which is no more than there are."""
    score = norms[:, None].masked_fill(~among, -torch.inf)
    index = rank(score)[..., :most]
    return index, torch.arange(most, device=norms.device) < limit[..., None]


def _set_order(pivots: Tensor, real: Tensor, place: Tensor | None) -> Tensor:
    """[B, S, V + T] long: a permutation that puts pivots in CPython's order, missing ones last."""
    batch, images, number = pivots.shape
    if place is None:
        places = pivots
    else:
        places = place.gather(1, pivots.flatten(1)).view_as(pivots)
    turns = []
    for row in places.masked_fill(~real, -1).flatten(0, 1).tolist():  # the copy to the host
        there = [value for value in row if value >= 0]
        first = [row.index(value) for value in set(there)]  # a list: a dict fills sets otherwise
        turns.append(first + [i for i, value in enumerate(row) if value < 0])
    order = torch.tensor(turns, dtype=torch.long).view(batch, images, number)
    return order.to(pivots.device, non_blocking=True)


def _check(
    norms: Tensor, hidden: Tensor, image: Tensor, text: Tensor, keep: Tensor, v: int, t: int
) -> None:
    if v < 1 or t < 0:
        raise ValueError(
            f"image_pivots is {v} and text_pivots {t}; they should be at least 1 and 0"
        )
    if norms.dim() != 2 or hidden.dim() != 3 or hidden.shape[:2] != norms.shape:
        raise ValueError(
            f"norms has shape {tuple(norms.shape)} and hidden {tuple(hidden.shape)}; they should "
            "be [B, L] and [B, L, D]"
        )
    batch, length = norms.shape
    for name, mask in (("image", image), ("text", text)):
        check_mask(name, mask, (batch, keep.shape[-1], length))
    if keep.shape != image.shape[:2]:
        raise ValueError(
            f"keep has shape {tuple(keep.shape)}; it should be [{batch}, S], a number per image"
        )
