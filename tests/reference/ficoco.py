"""FiCoCo as the official code has it, one layer at a time, made of our operators.

No method offers it: the class token moves to the end and the most redundant patch takes its part,
targets are numbered in one order and applied in another, and the grid outlives its image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.operators.ficoco import (
    compress,
    most_targets,
    patch_redundancy,
    soft_targets,
    text_redundancy,
    window_minimum,
)
from tokprune.operators.topk import rank

UNUSED = 1e9


def official_encoder_layer(
    hidden: Tensor, attention: Tensor, grid: Tensor, side: int, r: int, beta: float, quantile: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One cut of FiCoCo-V: merged rows, remaining rows in their new order, targets [r, K], and the
    new hidden states. ``grid`` [side²] is changed in place; closed cells are infinite."""
    n = len(hidden) - 1
    score = patch_redundancy(attention[None, 0, 1:], attention[None, 1:, 1:].mean(2), beta)[0]
    open_cells = grid.isfinite().nonzero().view(-1)[:n]
    grid[open_cells] = score[: len(open_cells)]
    cells = window_minimum(grid[None], (side, side))[0][0]
    tokens = cells[cells < n]  # numbers of cells, taken for numbers of tokens
    score[tokens] = torch.where(score[tokens] > 0, score[tokens] / 2, score[tokens] * 2)
    grid[tokens] = torch.inf
    order = rank(-torch.cat([torch.tensor([torch.inf]), score]))
    merged, remaining = order[:r], order[r:]
    targets, shares = _targets(attention[merged], quantile)
    places = torch.where(targets >= len(remaining), targets - r, targets)
    out = _compress_places(hidden, merged, remaining, places, shares)
    return merged, remaining, targets, out


def _compress_places(
    hidden: Tensor, merged: Tensor, remaining: Tensor, places: Tensor, shares: Tensor
) -> Tensor:
    """Targets are places among the remaining rows; two of one token may fall together."""
    out, weight = hidden[remaining].clone(), torch.ones(len(remaining))
    for row, where, share in zip(hidden[merged], places, shares):
        for place, part in zip(where.tolist(), share.tolist()):
            out[place] += part * row
            weight[place] += part
    return out / weight[:, None]


def official_decoder_layer(
    hidden: Tensor, attention: Tensor, visual: int, r: int, gamma: float, alpha: float,
    quantile: float, protected: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One cut of FiCoCo-L: merged rows, remaining rows, targets [r, K], new hidden states.
    ``protected``: leading tokens that stay."""
    among, across = attention[:visual, :visual], attention[:visual, visual:]
    score = text_redundancy(among.sum(1), across.mean(1), gamma)
    score[:protected] = -torch.inf
    order = rank(score)
    merged, remaining = order[:r], order[r:].sort().values
    correlation = alpha * among + (1 - alpha) * across @ attention[visual:, :visual]
    correlation.fill_diagonal_(-torch.inf)
    targets, shares = _targets(correlation[merged], quantile)
    out = compress(hidden[None], merged[None], targets[None], shares[None], divide=False)[0]
    stays = torch.ones(len(hidden), dtype=torch.bool)
    stays[merged] = False
    return merged, remaining, targets, out[stays]


def _targets(correlation: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    most = most_targets(correlation.shape[1], quantile)
    targets, shares = soft_targets(correlation[None], None, quantile, most, shared=True)
    threshold = correlation.quantile(quantile, dim=1, keepdim=True)
    used = int((correlation > threshold).sum(1).max())
    return targets[0, :, :used], shares[0, :, :used]
