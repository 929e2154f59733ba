"""Patches grouped by principal components, look-alikes of a group suppressed (PruneSID)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.checks import check_number
from tokprune.operators.diversity import DENSE_LIMIT
from tokprune.operators.rows import take_rows
from tokprune.operators.topk import rank

__all__ = ["group_choice", "group_order", "group_shares", "mean_similarity", "principal_groups"]

#: iterations of the official randomised decomposition
_POWER = 2


@torch.no_grad()
def principal_groups(
    x: Tensor, groups: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The component of all tokens that each one loads on most.

    Components are the first left singular vectors of sigmoid(x), each row less its own mean over
    the channels. On CUDA the solver waits for the device.

    Args:
        x: [B, N, C] features of any float dtype.
        groups: components G, 1 ≤ G ≤ min(N, C).
        generator: of the CPU; None: exact, in float64 (float32 on devices without it). Else a
            randomised decomposition in float32, as in the official code, with the same draw for
            every row of the batch.

    Returns:
        LongTensor [B, N], the component of each token (ties: the lower), and its absolute loading
        there [B, N] float32. Where singular values are equal, components are arbitrary.

    Raises:
        ValueError: ``groups`` is out of range.

    Source: PruneSID, arXiv 2603.09480, and its official code; the exact decomposition is ours.
    """
    check_number("groups", groups, min(x.shape[1:]), "components")
    y = torch.sigmoid(x.float())
    if generator is not None:
        loading = _randomised(y - y.mean(-1, keepdim=True), groups, generator)
    else:
        y = y if x.device.type == "mps" else y.double()
        y = y - y.mean(-1, keepdim=True)
        if y.shape[1] <= y.shape[2]:
            loading = torch.linalg.eigh(y @ y.mT).eigenvectors.flip(-1)[..., :groups]
        else:
            loading = y @ torch.linalg.eigh(y.mT @ y).eigenvectors.flip(-1)[..., :groups]
            loading = normalize(loading, dim=1)
    best = loading.abs().max(-1)
    return best.indices, best.values.float()


def _randomised(y: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """Left singular vectors [B, N, G] of ``y`` [B, N, C], by a random sketch of its rows."""
    sketch = torch.randn(y.shape[1], groups, generator=generator).to(y.device, non_blocking=True)
    basis = torch.linalg.qr(y.mT @ sketch).Q
    for _ in range(_POWER):
        basis = torch.linalg.qr(y @ basis).Q
        basis = torch.linalg.qr(y.mT @ basis).Q
    return torch.linalg.svd(y @ basis, full_matrices=False).U


def mean_similarity(x: Tensor) -> Tensor:
    """Mean cosine of all pairs of different tokens of [B, N, C] (any float dtype): [B] float32,
    0 for a single token.

    Source: ours, of sums instead of pairs.
    """
    unit = normalize(x.float(), dim=-1).double() if x.device.type != "mps" else normalize(x.float())
    n = x.shape[1]
    pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
    return (pairs / max(1, n * (n - 1))).float()


@torch.no_grad()
def group_order(
    x: Tensor, group: Tensor, score: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens of each group in the order in which they are worth keeping.

    In every group the token of the highest score is picked, those of the group that are more
    similar to it than the threshold are suppressed, and so on with the others until none is left.
    Suppressed tokens follow the picks. No host synchronisation; N dependent steps.

    Args:
        x: [B, N, C] features of any float dtype; cosines are float32.
        group: [B, N] long, number of each token's group.
        score: [B, N] of any float dtype; ties go to the lower position.
        threshold: [B] cosines above it suppress.

    Returns:
        LongTensor [B, N]: group after group; in each the picks, then the others, both by falling
        score; and bool [B, N], whether each token (by position) is a pick.

    Source: PruneSID, arXiv 2603.09480, suppression inside groups.
    """
    order = rank(score)
    unit, own = normalize(take_rows(x, order).float(), dim=-1), group.gather(1, order)
    n = order.shape[1]
    held = torch.bmm(unit, unit.mT) if n <= DENSE_LIMIT else None
    suppressed = torch.zeros_like(order, dtype=torch.bool)
    for i in range(n - 1):  # whoever comes is a pick unless a pick before it has suppressed it
        near = held[:, i] if held is not None else (unit @ unit[:, i, :, None])[..., 0]
        alike = (near > threshold[:, None]) & (own == own[:, i : i + 1]) & ~suppressed[:, i : i + 1]
        alike[:, : i + 1] = False
        suppressed |= alike
    turn = (2 * own + suppressed).argsort(dim=1, stable=True)
    pick = torch.empty_like(suppressed).scatter(1, order, ~suppressed)
    return order.gather(1, turn), pick


@torch.no_grad()
def group_shares(size: Tensor, picks: Tensor, total: int, budget: int | None = None) -> Tensor:
    """How many tokens each group keeps.

    Every group keeps one; the rest is shared in proportion to the picks, rounded in whole numbers
    (halves to even) from the running sum, at most 5·⌈total/64⌉ and no more than there are picks.
    Where these limits together are below ``total``, all rise by one, up to the group's size, until
    they are not. What the limits take from some groups goes to those of most picks.

    Args:
        size: [B, G] long, tokens of each group.
        picks: [B, G] long, of which picks.
        total: T ≥ 1, that the limits are made from.
        budget: tokens to keep, 0 ≤ budget ≤ ``total``; None: ``total``.

    Returns:
        LongTensor [B, G] that adds up to ``budget`` where there are at most so many groups, else
        to the number of groups that have tokens. No host synchronisation.

    Source: PruneSID, arXiv 2603.09480, official code; whole numbers are ours: the code's float32
    sums fall on either side of exact halves.
    """
    budget = total if budget is None else budget
    least = size.clamp(max=1)
    most = torch.minimum(size, picks).clamp(max=5 * -(-total // 64))
    raised = torch.arange(total + 1, device=size.device)[:, None]
    reached = torch.minimum(most[:, None] + raised, size[:, None]).sum(-1) >= total
    rounds = (~reached).sum(-1, keepdim=True)
    most = torch.minimum(most + rounds, size)
    spare = (budget - least.sum(-1, keepdim=True)).clamp(min=0)
    whole = picks.sum(-1, keepdim=True).clamp(min=1)
    ends = _round_half_even(spare * picks.cumsum(-1), whole)
    share = torch.minimum(torch.diff(ends, prepend=torch.zeros_like(ends[:, :1])) + least, most)
    missing = spare + least.sum(-1, keepdim=True) - share.sum(-1, keepdim=True)
    order = rank(picks)
    room = (most - share).gather(1, order)
    before = room.cumsum(-1) - room
    extra = torch.minimum(room, (missing - before).clamp(min=0))
    return share + torch.zeros_like(share).scatter(1, order, extra)


def _round_half_even(numerator: Tensor, denominator: Tensor) -> Tensor:
    whole, rest = numerator // denominator, 2 * (numerator % denominator)
    up = (rest > denominator) | ((rest == denominator) & (whole % 2 == 1))
    return whole + up


def group_choice(
    x: Tensor,
    group: Tensor,
    score: Tensor,
    groups: int,
    keep: int,
    total: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Suppression inside groups and each group's share, together.

    Args:
        x: [B, N, C] features of any float dtype.
        group: [B, N] long in 0…G−1.
        score: [B, N], higher is kept first.
        groups: G.
        keep: tokens to choose, 0 ≤ keep ≤ N.
        total: T, the budget that caps and the threshold are made from; None: ``keep``. The official
            code counts a class token that is kept beside the tokens.
        scale: tokens suppress those of a cosine above scale times the mean of all pairs; None:
            T/32.

    Returns:
        LongTensor [B, keep], group after group, in each by worth.

    Raises:
        ValueError: ``keep`` is out of range.

    Source: PruneSID, arXiv 2603.09480, official code for LLaVA.
    """
    n = x.shape[1]
    if not 0 <= keep <= n:
        raise ValueError(f"keep is {keep}; it should be between 0 and the {n} tokens of x")
    total = keep if total is None else total
    threshold = mean_similarity(x) * (total / 32 if scale is None else scale)
    order, pick = group_order(x, group, score, threshold)
    none = torch.zeros(len(group), groups, dtype=torch.long, device=group.device)
    size = none.scatter_add(1, group, torch.ones_like(group))
    share = group_shares(size, none.scatter_add(1, group, pick.long()), total, keep)
    own = group.gather(1, order)
    place = torch.arange(n, device=group.device) - (size.cumsum(-1) - size).gather(1, own)
    gone = (place >= share.gather(1, own)).to(torch.int8)
    return order.gather(1, gone.argsort(dim=1, stable=True)[:, :keep])
