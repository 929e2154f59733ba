"""Patches of outlying [CLS] attention, their neighbours in key space added to them, and one token
for what is left (LLaVA-PruMerge)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.outliers import outliers
from tokprune.operators.rows import take_rows
from tokprune.operators.topk import rank

__all__ = [
    "Adaptive", "adaptive", "by_attention", "cls_attention", "merge", "repeated",
    "spread",
]  # fmt: skip

#: rows of similarities held at once
_CHUNK = 256


def cls_attention(query: Tensor, key: Tensor) -> Tensor:
    """Attention of the class token over the channels as one head, itself left out.

    Args:
        query: [B, C] of the class token, bias included and not scaled, any float dtype.
        key: [B, 1 + N, C], class token first.

    Returns:
        [B, N] float32; the softmax runs over all 1 + N keys and is not renormalised.

    Source: LLaVA-PruMerge, arXiv 2403.15388, official code.
    """
    logits = torch.einsum("bc,btc->bt", query.float(), key.float()) * query.shape[-1] ** -0.5
    return logits.softmax(-1)[:, 1:]


# --------------------------------------------------------------------------- which patches


def by_attention(attn: Tensor) -> Tensor:
    """All patches by falling attention: LongTensor [B, N] from [B, N]; ties to the lower index."""
    return rank(attn)


def spread(attn: Tensor, best: int, others: int) -> Tensor:
    """The ``best`` patches of most attention, then ``others`` evenly spaced among those left (of M
    left in raster order those at ⌊(i + ½) · M / others⌋), then the rest, ascending.

    Args:
        attn: [B, N] of any float dtype.
        best, others: how many; together at most N.

    Returns:
        LongTensor [B, N], a permutation per row.

    Raises:
        ValueError: more than N are asked for.

    Source: ours, for fixed budgets of PruMerge+.
    """
    n = attn.shape[-1]
    if best + others > n:
        raise ValueError(
            f"best={best} and others={others} are more than the {n} patches; their sum should be "
            f"at most {n}"
        )
    order = rank(attn)
    left = order[:, best:].sort(-1).values
    return torch.cat([order[:, :best], left[:, _evenly(n - best, others, left.device)]], dim=1)


def _evenly(n: int, chosen: int, device: torch.device) -> Tensor:
    """``chosen`` of n places at equal distances, then the others, ascending [n]."""
    i = torch.arange(chosen, device=device)
    at = ((2 * i + 1) * n).div(max(1, 2 * chosen), rounding_mode="floor")
    taken = torch.zeros(n, dtype=torch.int8, device=device).index_fill(0, at, 1)
    return (1 - taken).argsort(stable=True)


def repeated(attn: Tensor, best: int, ratio: float, end: int) -> tuple[Tensor, int]:
    """The ``best`` patches of most attention, then a grid of step ⌊1/ratio⌋ as it is: a patch may
    be chosen twice, and for every repeat the lowest patch of the rest is left out.

    Args:
        attn: [B, N] of any float dtype.
        best: how many by attention.
        ratio: in (0, 1]; the grid starts at half a step.
        end: the grid ends before this patch.

    Returns:
        LongTensor [B, N], and how many of them are chosen.

    Source: LLaVA-PruMerge, official code of PruMerge+ with a fixed count.
    """
    n, step = attn.shape[-1], int(1 / ratio)
    grid = torch.arange(step // 2, min(end, n), step, device=attn.device).expand(len(attn), -1)
    chosen = torch.cat([rank(attn)[:, :best], grid], dim=1)[:, :n]
    taken = torch.zeros_like(attn, dtype=torch.int8).scatter(1, chosen, 1)
    # the rest stands at the end of this, ascending; repeats shift its start
    rest = (1 - taken).argsort(stable=True)[:, chosen.shape[1] :]
    return torch.cat([chosen, rest], dim=1), chosen.shape[1]


@dataclass(frozen=True, eq=False)
class Adaptive:
    """Patches by outlying attention, tile by tile."""

    #: [B, N] long: those chosen in output order, then the others, ascending
    order: Tensor
    #: how many are chosen by attention, and in all (host)
    best: Sequence[int]
    counts: Sequence[int]


def adaptive(
    attn: Tensor, plus: bool = False, shared: bool = False, least: int = 1, end: int | None = None
) -> Adaptive:
    """Choose as many patches as there are outliers; with ``plus`` a regular grid beside them, its
    step ⌊⌊1/ρ⌋/3⌋ (at least 1) for a share ρ of outliers. One read by the host.

    Args:
        attn: [B, N] attention of the class token, any float dtype.
        plus: add the grid.
        shared: quartiles and share are those of all tiles together, as in the official code.
        least: choose at least so many of each tile (the official code: 0).
        end: the grid ends before this patch; None: before the last, as published for 576.

    Returns:
        An ``Adaptive``.

    Source: LLaVA-PruMerge, arXiv 2403.15388, official code.
    """
    tiles, n = attn.shape
    found = outliers(attn.reshape(1, -1) if shared else attn).sum(-1).expand(tiles)
    size = tiles * n if shared else n
    # as the official code computes them: in floating point, rounded down
    share = [max(count, 1) / size for count in range(size + 1)]
    best_of = torch.tensor([max(least, int(n * (count / size))) for count in range(size + 1)])
    step_of = torch.tensor([max(1, int(1 / ratio) // 3) for ratio in share])
    best, step = torch.stack([best_of, step_of]).to(attn.device, non_blocking=True)[:, found]
    order = rank(attn)
    place = torch.arange(n, device=attn.device)
    key = torch.full_like(order, 2 * n) + place
    if plus:
        on_grid = (place % step[:, None] == 0) & (place < (n - 1 if end is None else end))
        key = torch.where(on_grid, place + n, key)
    at = torch.empty_like(order).scatter(1, order, place.expand_as(order))
    key = torch.where(at < best[:, None], at, key)
    chosen = torch.stack([best, (key < 2 * n).sum(-1)]).tolist()
    return Adaptive(key.argsort(-1), *chosen)


# ------------------------------------------------------------------------------- merging


def merge(
    hidden: Tensor, key: Tensor, attn: Tensor, order: Tensor, count: int, neighbours: int = 32
) -> Tensor:
    """Add to every chosen patch its nearest others, and sum what is not chosen into one token.

    Row i is x_i + Σ a_j x_j over the ``neighbours`` entries of ``order`` (its own left out) whose
    keys have the greatest cosine with its own; the last row is Σ a_j x_j over all patches that are
    not chosen. Weights are raw attention; the x are those from before the merging.

    Args:
        hidden: [B, N, D] features of the patches, any float dtype; the arithmetic is float32.
        key: [B, N, C] of any float dtype.
        attn: [B, N] float32.
        order: [B, N] long: the chosen patches in output order, then the others.
        count: S, how many are chosen, 0 … N.
        neighbours: at most N − 1 of them exist; of equal cosines the earlier in ``order``.

    Returns:
        [B, S + 1, D] in the dtype of ``hidden``. All sizes are static, and no more than 256 rows of
        similarities per tile are held.

    Raises:
        ValueError: ``neighbours`` < 1, ``count`` outside 0 … N, or shapes do not match.

    Source: LLaVA-PruMerge, arXiv 2403.15388, official code (its sums are not normalised).
    """
    n = order.shape[1]
    if neighbours < 1:
        raise ValueError(f"neighbours is {neighbours}; it should be at least 1")
    if not 0 <= count <= n:
        raise ValueError(f"count is {count}; it should be between 0 and the {n} patches")
    for name, value in (("hidden", hidden), ("key", key), ("attn", attn)):
        if value.shape[:2] != order.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it should be {tuple(order.shape)} …"
            )
    x, weight = take_rows(hidden, order).float(), attn.float().gather(1, order)
    unit = normalize(take_rows(key, order).float(), dim=-1, eps=1e-12)
    rows = []
    for start in range(0, count, _CHUNK):
        part = slice(start, min(start + _CHUNK, count))
        near = unit[:, part] @ unit.transpose(1, 2)
        near.diagonal(start, 1, 2).fill_(-torch.inf)
        at = rank(near)[..., : min(neighbours, n - 1)]
        share = torch.zeros_like(near).scatter(2, at, weight[:, None].expand_as(near).gather(2, at))
        rows.append(x[:, part] + share @ x)
    rows.append(weight[:, None, count:] @ x[:, count:])
    return torch.cat(rows, dim=1).to(hidden.dtype)
