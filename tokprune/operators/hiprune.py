"""Patches that a middle layer attends to, with their neighbours, and those of a deep one."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.operators.checks import check_number
from tokprune.operators.topk import rank

__all__ = ["anchors_and_registers"]

#: patches that an anchor brings along at most, itself included
_CROSS = 5


@torch.no_grad()
def anchors_and_registers(
    middle: Tensor,
    deep: Tensor,
    keep: int,
    alpha: float,
    grid: tuple[int, int],
    cells: Tensor | None = None,
    strict_neighbours: bool = False,
) -> Tensor:
    """Anchors, the highest of one score; their neighbours; then the highest of another score.

    There are round(keep · α/5) anchors, halves to even. Where they and their neighbours are more
    than ``keep``, the anchors come first, then the neighbours anchor by anchor: before, behind,
    above, below. No host synchronisation.

    Args:
        middle: [B, N] score that anchors are the highest of, any float dtype.
        deep: [B, N] score that fills the rest.
        keep: tokens in all, 1 ≤ keep ≤ N.
        alpha: α in [0, 1], the share of ``keep`` for anchors with four neighbours each.
        grid: (height, width) of the grid that the tokens stand on.
        cells: [B, N] long, the cell of each token in raster order, none twice; None: one on each
            cell. Neighbours on cells without token are nobody's.
        strict_neighbours: only cells that share an edge are neighbours. Else, as in the official
            code, the numbers ±1 and ± width in raster order are: behind a row's end comes the next
            row, and what lies above or below the grid is its first or last cell.

    Returns:
        LongTensor [B, keep], ascending; of equal scores the lower position first.

    Raises:
        ValueError: a number is out of range, or shapes do not match.

    Source: HiPrune, arXiv 2508.00553. Budgets smaller than anchors and neighbours together,
    ``cells`` and ``strict_neighbours`` are ours.
    """
    n, (height, width) = middle.shape[-1], grid
    check_number("keep", keep, n)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it should be in [0, 1]")
    if middle.shape != deep.shape or middle.dim() != 2:
        raise ValueError(
            f"middle has shape {tuple(middle.shape)} and deep {tuple(deep.shape)}; both should be "
            "[B, N]"
        )
    if cells is None and n != height * width:
        raise ValueError(f"grid is {grid}; its product should be the {n} tokens, or give cells")
    place = torch.arange(n, device=middle.device).expand_as(middle)
    cells = place if cells is None else cells
    anchors = rank(middle)[:, : round(keep * alpha / _CROSS)]
    cell = cells.gather(1, anchors)[:, :, None]
    row, column = cell // width, cell % width
    beside = torch.cat([cell - 1, cell + 1, cell - width, cell + width], dim=-1)
    if strict_neighbours:
        inside = torch.cat([column > 0, column < width - 1, row > 0, row < height - 1], dim=-1)
        beside = torch.where(inside, beside, cell)
    beside = beside.clamp(0, height * width - 1).flatten(1)
    token = torch.full((len(cells), height * width), -1, device=cells.device)
    token = token.scatter(1, cells, place).gather(1, beside)
    # a neighbour that is not there is the anchor once more, which changes nothing
    buffers = torch.where(token < 0, anchors.repeat_interleave(_CROSS - 1, dim=1), token)
    wanted = torch.cat([anchors, buffers, rank(deep)], dim=1)
    turn = torch.arange(wanted.shape[1], device=wanted.device).expand_as(wanted)
    first = torch.full_like(place, wanted.shape[1]).scatter_reduce(1, wanted, turn, "amin")
    return first.argsort(dim=1)[:, :keep].sort(-1).values
