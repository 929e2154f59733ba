"""Tokens of a grid that are looked at in windows, early on, or on the whole, late; merged into
them, all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.bipartite import best_neighbour
from tokprune.operators.checks import check_choice
from tokprune.operators.rows import take_rows
from tokprune.operators.topk import rank

__all__ = ["LocalShares", "Merged", "grid_windows", "local_best", "merge_into", "two_scans"]

LocalShares = Literal["spread", "limit", "floor"]


@dataclass(frozen=True, eq=False)
class Merged:
    """Kept tokens with what was averaged into them."""

    #: [B, K, D] in the dtype of the features
    out: Tensor
    #: [B, N] long in 0…K−1, the kept token that holds each token
    group: Tensor


def grid_windows(grid: tuple[int, int], window: int) -> Tensor:
    """The window of each cell; rows and columns that are left over belong to the last windows.

    Args:
        grid: (height, width).
        window: cells each way, at least 1; a smaller grid is one window.

    Returns:
        [height · width] long, windows in raster order (host).

    Raises:
        ValueError: ``window`` < 1.

    Source: VScan, arXiv 2505.22654, official code for Qwen2.5-VL.
    """
    if window < 1:
        raise ValueError(f"window is {window}; it should be at least 1")
    down, across = (max(1, length // window) for length in grid)
    window = min(window, max(grid))
    row = (torch.arange(grid[0]) // window).clamp(max=down - 1)
    column = (torch.arange(grid[1]) // window).clamp(max=across - 1)
    return (row[:, None] * across + column).flatten()


def local_best(score: Tensor, window: Tensor, windows: int, budget: int,
               shares: LocalShares = "spread") -> Tensor:  # fmt: skip
    """Tokens of the highest scores, shared between windows.

    Args:
        score: [B, N] of any float dtype.
        window: [N] long in 0…windows−1.
        windows: their number W.
        budget: L in 0…N.
        shares: "spread": the best of every window, then the second, …; of the last round those of
            the highest scores (ours). "floor": ⌊L/W⌋ of each window, and the rest is lost
            (official code for LLaVA). "limit": by falling score, at most ⌈L/W⌉ of a window
            (official code for Qwen2.5-VL), others only once no window has room.

    Returns:
        [B, L] long ("floor": [B, W·⌊L/W⌋]): "limit" by falling score, else window after window, by
        falling score in each. Of equal scores the lower position first. What a window is too small
        for, others get.

    Raises:
        ValueError: ``budget`` outside 0…N, unknown ``shares``.

    Source: VScan, arXiv 2505.22654, local scan.
    """
    check_choice("shares", shares, LocalShares)
    tokens = score.shape[1]
    if not 0 <= budget <= tokens:
        raise ValueError(f"budget is {budget}; it should be between 0 and the {tokens} tokens")
    window = window.to(score.device, non_blocking=True)
    falling = rank(score)
    own = window[falling]
    by_window = own.sort(dim=1, stable=True)
    ordered = falling.gather(1, by_window.indices)  # window after window
    size = torch.zeros(windows, dtype=torch.long, device=score.device)
    size = size.scatter_add(0, window, torch.ones_like(window))
    start = size.cumsum(0) - size
    place = torch.arange(tokens, device=score.device) - start[by_window.values]
    place = torch.empty_like(place).scatter(1, by_window.indices, place)  # of ``falling``
    if shares == "limit":
        over = (place >= -(-budget // windows)).to(torch.int8)
        chosen = over.sort(dim=1, stable=True).indices[:, :budget].sort(1).values
        return falling.gather(1, chosen)
    if shares == "floor":
        each = budget // windows
        budget = each * windows
    chosen = place.sort(dim=1, stable=True).indices[:, :budget]
    taken = torch.zeros_like(own, dtype=torch.bool).scatter(1, chosen, True)
    taken = taken.gather(1, by_window.indices)
    return ordered.gather(1, (~taken).to(torch.int8).sort(dim=1, stable=True).indices[:, :budget])


def two_scans(
    shallow: Tensor, deep: Tensor, window: Tensor, windows: int, budget: int,
    shares: LocalShares = "spread",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Half of a budget by the shallow score inside windows, the rest by the deep score.

    Args:
        shallow, deep: [B, N] of any float dtype.
        window, windows, shares: see ``local_best``.
        budget: T in 0…N.

    Returns:
        Local tokens as ``local_best`` gives them, and [B, T − ⌊T/2⌋] global ones by falling deep
        score; none is in both.

    Raises:
        ValueError: those of ``local_best``.

    Source: VScan, arXiv 2505.22654, first stage.
    """
    local = local_best(shallow, window, windows, budget // 2, shares)
    rest = deep.float().scatter(1, local, -torch.inf)
    return local, rank(rest)[:, : budget - budget // 2]


def merge_into(features: Tensor, keep: Tensor) -> Merged:
    """Average every other token into the kept one of greatest cosine similarity.

    A row is the plain mean of the kept token and all that joined it.

    Args:
        features: [B, N, D] of any float dtype; cosines and sums in float32.
        keep: [B, K] long, K ≥ 1, no token twice.

    Returns:
        A ``Merged``; of equal similarities the earlier entry of ``keep``.

    Source: VScan, arXiv 2505.22654, token merging.
    """
    batch, tokens, width = features.shape
    kept = keep.shape[1]
    mark = torch.zeros(batch, tokens, dtype=torch.int8, device=features.device)
    others = mark.scatter(1, keep, 1).sort(dim=1, stable=True).indices[:, : tokens - kept]
    unit = normalize(features.float(), dim=-1, eps=1e-8)
    joined = best_neighbour(take_rows(unit, others), take_rows(unit, keep))[1]
    group = torch.zeros(batch, tokens, dtype=torch.long, device=features.device)
    own = torch.arange(kept, device=keep.device).expand(batch, kept)
    group = group.scatter(1, keep, own).scatter(1, others, joined)
    total = torch.zeros(batch, kept, width, device=features.device)
    total = total.scatter_add(1, group[..., None].expand(-1, -1, width), features.float())
    size = torch.zeros(batch, kept, device=features.device)
    size = size.scatter_add(1, group, torch.ones_like(group, dtype=torch.float32))
    return Merged((total / size[..., None]).to(features.dtype), group)
