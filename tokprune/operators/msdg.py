"""Groups of patches by the direction in which an encoder changes them (MSDG-Prune)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.checks import check_mask, check_number, check_points
from tokprune.operators.diversity import row_getter
from tokprune.operators.rows import take_rows
from tokprune.operators.topk import segment_topk

__all__ = [
    "Grouped", "change_direction", "question_saliency", "salient_of_groups", "softmax_budgets",
    "spherical_groups",
]  # fmt: skip

#: rounds of k-means at most, and the relative change of the loss that ends it
_ROUNDS, _SETTLED = 10, 1e-5


class Grouped(NamedTuple):
    """What :func:`salient_of_groups` finds."""

    #: [B, k] long, tokens that stay, ascending
    kept: Tensor
    #: [B, n] long, group of every token, −1 for sinks
    group: Tensor
    #: [B, K] long, tokens that stay of every group
    budget: Tensor


def change_direction(early: Tensor, late: Tensor) -> Tensor:
    """Direction of the way from one state of a patch to a later one, both of length one.

    Args:
        early, late: [*, n, d] of any float dtype; the arithmetic is float32.

    Returns:
        [*, n, d] float32 of length one; zero where nothing changed.

    Raises:
        ValueError: shapes differ.

    Source: MSDG-Prune, arXiv 2609.36916, Algorithm 1.
    """
    if early.shape != late.shape:
        raise ValueError(
            f"early has shape {tuple(early.shape)} and late {tuple(late.shape)}; they should be "
            "states of the same patches"
        )
    return normalize(normalize(late.float(), dim=-1) - normalize(early.float(), dim=-1), dim=-1)


def question_saliency(
    change: Tensor, projected: Tensor, query: Tensor, words: Tensor | None = None
) -> Tensor:
    """Length of a token's change times its largest cosine to a word, which may be negative.

    Args:
        change: [B, n].
        projected: [B, n, d] tokens in the space of the words, of any float dtype; the arithmetic is
            float32.
        query: [B, m, d] words. Where there are none, the change alone counts (ours).
        words: [B, m] bool, words that are there; None means all.

    Returns:
        [B, n] float32.

    Raises:
        ValueError: shapes or dtypes do not match.

    Source: MSDG-Prune, arXiv 2609.36916, Algorithm 1.
    """
    if change.shape != projected.shape[:-1] or projected.shape[::2] != query.shape[::2]:
        raise ValueError(
            f"change has shape {tuple(change.shape)}, projected {tuple(projected.shape)} and query "
            f"{tuple(query.shape)}; they should be [B, n], [B, n, d] and [B, m, d]"
        )
    if not query.shape[1]:
        return change.float()
    cosine = normalize(projected.float(), dim=-1) @ normalize(query.float(), dim=-1).mT
    if words is not None:
        check_mask("words", words, query.shape[:2])
        cosine = cosine.masked_fill(~words[:, None], -torch.inf)
    best = cosine.amax(-1)
    return change.float() * torch.where(best == -torch.inf, 1.0, best)


@torch.no_grad()
def spherical_groups(
    direction: Tensor, groups: int, candidates: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Spherical k-means from a farthest-first start.

    The first centroid is candidate number ``seed`` modulo their number, each next one the candidate
    that is least similar to its most similar centroid. At most ten rounds; samples that have
    settled stand still in the rest of them, so none waits for the device or for another sample.
    Centroids without a member start again at the tokens that were served worst. Ties go to the
    lower index.

    Args:
        direction: [B, n, d] of any float dtype, scaled to length one here. Products are float64
            (float32 on devices without it): in tight groups the loss is all cancellation.
        groups: K, at least 1; of n tokens at most n are made.
        candidates: [B, n] bool, tokens to group; None means all. What the others hold plays no
            part.
        seed: see above.

    Returns:
        LongTensor [B, n], −1 for tokens that are no candidates.

    Raises:
        ValueError: ``groups`` below 1, or shapes or dtypes do not match.

    Source: MSDG-Prune, arXiv 2609.36916, Algorithm 1.
    """
    check_points(direction)
    batch, n = direction.shape[:2]
    if groups < 1:
        raise ValueError(f"groups is {groups}; it should be at least 1")
    d, groups = direction.to(_exact(direction)), min(groups, n)
    real = torch.ones(batch, n, dtype=torch.bool, device=d.device)
    if candidates is not None:
        check_mask("candidates", candidates, (batch, n))
        real = candidates
        d = d.masked_fill(~real[..., None], 0.0)
    d = normalize(d, dim=-1)
    count = real.sum(-1).clamp(min=1)
    centroids = _farthest_first(d, groups, real, seed)
    numbers = torch.arange(groups, device=d.device)

    label = last = torch.zeros(batch, n, dtype=torch.long, device=d.device)
    loss = d.new_zeros(batch)
    done = torch.zeros(batch, dtype=torch.bool, device=d.device)
    for step in range(_ROUNDS):
        best, label = (d @ centroids.mT).max(-1)
        now = (1 - best).masked_fill(~real, 0.0).sum(-1) / count
        if step:
            moved = ((label != last) & real).any(-1)
            done = done | ~moved | ((now - loss).abs() / loss.abs().clamp(min=1e-12) < _SETTLED)
        last, loss = label, now
        member = ((label[..., None] == numbers) & real[..., None]).to(d.dtype)
        empty = member.sum(1) == 0
        worst = best.masked_fill(~real, torch.inf).sort(dim=-1, stable=True).indices
        spare = take_rows(d, worst.gather(1, (empty.cumsum(-1) - 1).clamp(min=0)))
        new = torch.where(empty[..., None], spare, normalize(member.mT @ d, dim=-1))
        centroids = torch.where(done[:, None, None], centroids, new)
    label = (d @ centroids.mT).max(-1).indices
    return label.masked_fill(~real, -1)


def _exact(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _farthest_first(d: Tensor, groups: int, real: Tensor, seed: int) -> Tensor:
    """Centroids [B, groups, d] to begin with."""
    number = real.cumsum(-1) - 1
    first = real & (number == seed % real.sum(-1, keepdim=True).clamp(min=1))
    pick, row = first.to(torch.int8).argmax(-1), row_getter(d)
    nearest, made = torch.full_like(d[..., 0], -torch.inf), [row(pick)]
    while len(made) < groups:
        nearest = torch.maximum(nearest, torch.bmm(d, made[-1][..., None])[..., 0])
        made.append(row(nearest.masked_fill(~real, torch.inf).argmin(-1)))
    return torch.stack(made, 1)


def softmax_budgets(saliency: Tensor, group: Tensor, groups: int, budget: Tensor) -> Tensor:
    """A budget shared by the softmax of the groups' mean saliencies, none of which gets more than
    it has.

    Every group gets the whole part of its share; groups that are not full then get one more each,
    those of the largest rest first; what is left fills groups by falling share, one after the
    other. Saliencies in the tens make the softmax one-hot, and the last rule decide.

    Args:
        saliency: [B, n].
        group: [B, n] long, 0 … groups − 1, or −1 where a token is in none.
        groups: K.
        budget: [B] long, at most the number of tokens that are in a group.

    Returns:
        LongTensor [B, K]. Shares are float64 (float32 on devices without it).

    Raises:
        ValueError: shapes do not match.

    Source: MSDG-Prune, arXiv 2609.36916, Algorithm 1.
    """
    if saliency.dim() != 2 or group.shape != saliency.shape or budget.shape != saliency.shape[:1]:
        raise ValueError(
            f"saliency has shape {tuple(saliency.shape)}, group {tuple(group.shape)} and budget "
            f"{tuple(budget.shape)}; they should be [B, n], [B, n] and [B]"
        )
    exact = _exact(saliency)
    member = group[..., None] == torch.arange(groups, device=group.device)
    size = member.sum(1)
    total = (member.to(exact) * saliency.to(exact)[..., None]).sum(1)
    part = (total / size.clamp(min=1)).softmax(-1)
    share = budget[:, None] * part
    whole = share.floor()
    given = torch.minimum(size, whole.long())

    def by(key: Tensor) -> Tensor:
        return key.sort(dim=-1, descending=True, stable=True).indices

    left = (budget - given.sum(-1)).clamp(min=0)[:, None]
    free = given < size
    order = by((share - whole).masked_fill(~free, -1.0))
    more = free.gather(1, order) & (torch.arange(groups, device=order.device) < left)
    given = given.scatter_add(1, order, more.long())

    left = (budget - given.sum(-1)).clamp(min=0)[:, None]
    order = by(part)
    room = (size - given).gather(1, order)
    before = room.cumsum(-1) - room
    return given.scatter_add(1, order, torch.minimum(room, (left - before).clamp(min=0)))


@torch.no_grad()
def salient_of_groups(
    direction: Tensor, saliency: Tensor, k: int, groups: int = 20, sink: Tensor | None = None,
    seed: int = 0,
) -> Grouped:  # fmt: skip
    """The most salient tokens of every group, as many as :func:`softmax_budgets` gives it.

    Sinks are in no group, and stay only where fewer than ``k`` other tokens are there: those of the
    largest saliency (ours; the paper has no such case). No host synchronisation.

    Args:
        direction: [B, n, d] from :func:`change_direction`, or means of such.
        saliency: [B, n] from :func:`question_saliency`.
        k: tokens to keep, 1 ≤ k ≤ n.
        groups, seed: see :func:`spherical_groups`.
        sink: [B, n] bool; None means none.

    Returns:
        A ``Grouped``; of equal saliencies the lower index stays.

    Raises:
        ValueError: a number is out of range, or shapes or dtypes do not match.

    Source: MSDG-Prune, arXiv 2609.36916, Algorithm 1.
    """
    if direction.dim() != 3 or saliency.shape != direction.shape[:-1]:
        raise ValueError(
            f"direction has shape {tuple(direction.shape)} and saliency {tuple(saliency.shape)}; "
            "they should be [B, n, d] and [B, n]"
        )
    check_number("k", k, direction.shape[1])
    real = None if sink is None else ~sink
    group = spherical_groups(direction, groups, real, seed)
    groups = min(groups, direction.shape[1])
    count = (group >= 0).sum(-1)
    budget = softmax_budgets(saliency, group, groups, count.clamp(max=k))
    apart = torch.where(group < 0, groups, group)
    stays = segment_topk(saliency, apart, torch.cat([budget, (k - count)[:, None]], dim=1))
    kept = stays.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return Grouped(kept, group, budget)
