"""Filter, correlate, compress: which tokens are redundant, what they resemble, and soft merges."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from tokprune.operators.topk import rank

__all__ = [
    "compress", "head_mean", "most_targets", "patch_redundancy", "penalise", "soft_targets",
    "text_redundancy", "window_minimum",
]  # fmt: skip


def head_mean(query: Tensor, key: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Vectors whose products are the attention logits averaged over the heads.

    The mean of logits is one product of all heads together, so that any row, column or sum of the
    map [L, L] is had without the map.

    Args:
        query: [B, H, Lq, d]; key: [B, Hkv, Lk, d], H a multiple of Hkv. Any float dtype.
        scaling: of the logits.

    Returns:
        float32 q [B, Lq, Hkv·d] and k [B, Lk, Hkv·d]; ``q @ k.mT`` is the mean over heads of
        ``scaling · query @ key.mT``, before mask and softmax.

    Raises:
        ValueError: the heads do not fit.
    """
    heads, groups = query.shape[1], key.shape[1]
    if heads % groups:
        raise ValueError(
            f"query has {heads} heads and key {groups}; the first should be a multiple"
        )
    shared = query.float().unflatten(1, (groups, heads // groups)).sum(2)
    scaled = shared * (scaling / heads)
    return scaled.transpose(1, 2).flatten(2), key.float().transpose(1, 2).flatten(2)


def patch_redundancy(class_row: Tensor, among: Tensor, beta: float) -> Tensor:
    """Class attention for a patch, attention among patches against it; each of unit length.

    Args:
        class_row: [B, n] what the class token makes of each patch (logits).
        among: [B, n] mean logits of each patch to all patches.
        beta: weight of the first, 0 … 1.

    Returns:
        [B, n] float32; small is redundant.

    Source: FiCoCo, arXiv 2411.17686, filter stage of FiCoCo-V.
    """
    class_row, among = (normalize(x.float(), dim=-1, eps=1e-12) for x in (class_row, among))
    return beta * class_row - (1 - beta) * among


def text_redundancy(among: Tensor, text: Tensor, gamma: float) -> Tensor:
    """Attention to other visual tokens, less the attention from text.

    Args:
        among: [..., n] summed logits of each token to all visual tokens.
        text: [..., n] mean logits over the text.
        gamma: weight of the first, 0 … 1.

    Returns:
        [..., n] float32; large is redundant.

    Source: FiCoCo, arXiv 2411.17686, filter stage of FiCoCo-L.
    """
    return gamma * among.float() - (1 - gamma) * text.float()


def window_minimum(values: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cell of least value of every 2 × 2 window of a grid, the first in raster order of equals.

    Args:
        values: [B, H·W] float, +∞ where a cell does not count.
        grid: (H, W); windows at odd edges are smaller.

    Returns:
        cells [B, ⌈H/2⌉·⌈W/2⌉] long and their values.
    """
    height, width = grid
    padded = pad(values.unflatten(1, grid), (0, width % 2, 0, height % 2), value=torch.inf)
    down, across = padded.shape[1] // 2, padded.shape[2] // 2
    windows = padded.view(-1, down, 2, across, 2).transpose(2, 3).flatten(3)
    least = rank(-windows)[..., 0]
    top = 2 * torch.arange(down, device=values.device)[:, None] + least // 2
    left = 2 * torch.arange(across, device=values.device) + least % 2
    found = windows.gather(3, least[..., None]).flatten(1)
    return (top * width + left).flatten(1), found


def penalise(
    score: Tensor, cell: Tensor, closed: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Make the least of every 2 × 2 window still smaller (half of a positive score, twice another),
    so that merges spread over the image. Each cell is chosen at most once.

    Args:
        score: [B, n] float; +∞ is never chosen.
        cell: [B, n] long, cell of the grid that each token stands on, −1 for none.
        closed: [B, H·W] bool, cells that were chosen before.
        grid: (H, W).

    Returns:
        The changed scores [B, n], and ``closed`` with the chosen cells.

    Source: FiCoCo, arXiv 2411.17686, local penalty of FiCoCo-V; the window's size is the code's.
    """
    cells = grid[0] * grid[1]
    spare = torch.where(cell < 0, cells, cell)
    values = score.new_full((len(score), cells + 1), torch.inf).scatter(1, spare, score)
    found, least = window_minimum(values[:, :cells].masked_fill(closed, torch.inf), grid)
    found = torch.where(least < torch.inf, found, cells)
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen = chosen.scatter(1, found, torch.ones_like(found, dtype=torch.bool))
    chosen[:, cells] = False
    smaller = torch.where(score > 0, score / 2, score * 2)
    return torch.where(chosen.gather(1, spare), smaller, score), closed | chosen[:, :cells]


def most_targets(columns: int, quantile: float) -> int:
    """The most entries of ``columns`` that can lie above their quantile, at least 1 (host)."""
    # a little less, as the device rounds to float32; one entry too many does no harm
    place = max(0.0, quantile * (columns - 1) * (1 - 1e-6))
    return max(1, columns - 1 - math.floor(place))


def soft_targets(
    correlation: Tensor, allowed: Tensor | None, quantile: float, most: int, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """The tokens that each merged one goes to, and in what shares.

    Targets are the columns above the row's quantile (linear between entries), at least one; shares
    are the softmax of the row over them. Ties go to the lower column.

    Args:
        correlation: [B, r, n] float.
        allowed: [B, n] bool, columns that may be targets, at least one each; None: all. Others do
            not count for the quantile.
        quantile: 0 … 1.
        most: width K of the answer; :func:`most_targets` of the largest number of columns.
        shared: every row takes as many as the row with most (official code).

    Returns:
        targets [B, r, K] long by falling correlation, and shares [B, r, K] float32 that sum to 1,
        0 where a row has fewer.

    Source: FiCoCo, arXiv 2411.17686, token-adaptive K of the correlate stage.
    """
    rows = correlation.float()
    number = torch.full((len(rows), 1), rows.shape[-1], device=rows.device)
    if allowed is not None:
        rows = rows.masked_fill(~allowed[:, None], -torch.inf)
        number = allowed.sum(1, keepdim=True)
    values, order = rows.sort(dim=-1, descending=True, stable=True)
    place = quantile * (number - 1).float()
    below = place.floor()

    def entry(ascending: Tensor) -> Tensor:
        index = (number - 1 - ascending.long()).clamp(min=0)[:, :, None]
        return values.gather(2, index.expand(-1, values.shape[1], -1))

    low, high = entry(below), entry(below + 1)
    threshold = torch.lerp(low, high, (place - below)[:, :, None])
    order, values = order[..., :most], values[..., :most]
    above = values > threshold
    if shared:
        above = above.any(1, keepdim=True).expand_as(above)
    above = above | (torch.arange(above.shape[-1], device=above.device) == 0)
    return order, values.masked_fill(~above, -torch.inf).softmax(-1)


def compress(
    hidden: Tensor, merged: Tensor, targets: Tensor, shares: Tensor, divide: bool = True
) -> Tensor:
    """Add each merged token to its targets by its shares.

    x_j ← (x_j + Σ_i w_ij·x_i) / (1 + Σ_i w_ij), in float32; the merged rows themselves are there
    still, and are to be dropped.

    Args:
        hidden: [B, T, D] any float dtype; never changed.
        merged: [B, r] long, rows that are merged.
        targets: [B, r, K] long, rows that receive; shares: [B, r, K] float32.
        divide: by 1 + Σ w (official code of FiCoCo-L: False).

    Returns:
        [B, T, D] in the dtype of ``hidden``.

    Source: FiCoCo, arXiv 2411.17686, compress stage.
    """
    weight = shares.new_zeros(*merged.shape, hidden.shape[1]).scatter(2, targets, shares)
    extra = hidden.gather(1, merged[:, :, None].expand(-1, -1, hidden.shape[2])).float()
    total = hidden.float() + weight.mT @ extra
    if divide:
        total = total / (1 + weight.sum(1))[:, :, None]
    return total.to(hidden.dtype)
