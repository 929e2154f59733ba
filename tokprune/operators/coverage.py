"""Greedy coverage: tokens to which many others are similar and that are salient themselves."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.checks import check_choice, check_points, check_selection
from tokprune.operators.diversity import DENSE_LIMIT
from tokprune.operators.kernels import LONGEST_ROW, available
from tokprune.operators.rows import take_rows

__all__ = ["Combine"]

Combine = Literal["multi", "add"]

#: rows of the N×N similarities whose gains are summed at once
_CHUNK = 1024


@torch.no_grad()
def coverage(
    x: Tensor, k: int, saliency: Tensor | None = None, alpha: float = 1.0,
    combine: Combine = "multi", candidates: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Greedy facility location on cosines, the gain of each token weighted by its saliency.

    With s the cosines and m_i = max(0, s_ic over the chosen c) what covers token i so far, a step
    adds the token j with the largest gain_j · w_j^α (or gain_j + w_j^α), where
    gain_j = Σ_i max(0, s_ij − m_i). Negative cosines never cover. Prefixes nest: the first j
    entries are the result for k = j. No host synchronisation.

    Once everything is covered all gains are 0 and the lowest positions follow, none twice.

    Args:
        x: [*, n, d] token features of any float dtype; the arithmetic is float32. A zero row has
            cosine 0 with everything.
        k: tokens to choose, 1 ≤ k ≤ n. Rows with fewer than k candidates give repeated indices.
        saliency: [*, n] w, at least 0, any float dtype; None means 1 (pure coverage).
        alpha: α, at least 0; 0 leaves the coverage alone.
        combine: "multi" multiplies gain and w^α, "add" adds them.
        candidates: [*, n] bool, tokens that may be chosen and that want to be covered; None means
            all. What the other rows hold, NaN included, plays no part.

    Returns:
        LongTensor [*, k], selection order; of equal scores the lower index.

    Raises:
        ValueError: ``k`` or ``alpha`` out of range, unknown ``combine``, or shapes or dtypes do not
            match.

    Source: SCOPE, arXiv 2510.24214, saliency-coverage score; the weight α and both combinations
    are those of its official code. Float32 and ``candidates`` are ours.
    """
    check_points(x)
    check_selection(x.shape[:-1], k, candidates)
    check_choice("combine", combine, Combine)
    if not alpha >= 0:
        raise ValueError(
            f"alpha is {alpha}; it should be at least 0: below, tokens of saliency 0 would weigh "
            "infinitely much"
        )
    if saliency is not None and saliency.shape != x.shape[:-1]:
        raise ValueError(
            f"saliency has shape {tuple(saliency.shape)}; it should be {tuple(x.shape[:-1])}, one "
            "number per token"
        )
    if candidates is not None:
        x = x.masked_fill(~candidates[..., None], 0.0)
        candidates = candidates.reshape(-1, x.shape[-2])
    unit = normalize(rearrange(x, "... n d -> (...) n d").float(), dim=-1)
    weight = unit.new_ones(unit.shape[:-1])
    if saliency is not None:
        weight = saliency.to(unit.device).float().reshape(weight.shape) ** float(alpha)
    multiply = combine == "multi"
    if available(unit) and unit.shape[1] <= LONGEST_ROW:
        from tokprune.operators.kernels.coverage import coverage_picks

        matrix = torch.bmm(unit, unit.transpose(1, 2))
        order = coverage_picks(matrix, weight, k, candidates, multiply=multiply)
    else:
        order = _greedy(unit, weight, k, candidates, multiply)
    return order.reshape(*x.shape[:-2], k)


def _greedy(
    unit: Tensor, weight: Tensor, k: int, candidates: Tensor | None, multiply: bool
) -> Tensor:
    """k dependent steps, each over all rows of the similarities in chunks: [B, k]."""
    batch, n = weight.shape
    columns = unit.transpose(1, 2)
    held = torch.bmm(unit, columns) if n <= DENSE_LIMIT else None
    covered, closed = weight.new_zeros(batch, n), torch.zeros_like(weight, dtype=torch.bool)
    if candidates is not None:
        closed = ~candidates
        covered.masked_fill_(closed, torch.inf)  # whoever is no candidate has nothing to gain
    order: list[Tensor] = []
    while True:
        gains = []
        for start in range(0, n, _CHUNK):
            part = slice(start, start + _CHUNK)
            rows = torch.bmm(unit[:, part], columns) if held is None else held[:, part]
            gains.append((rows - covered[:, None]).clamp_(min=0).sum(-1))
        gain = torch.cat(gains, 1)
        score = gain * weight if multiply else gain + weight
        pick = score.masked_fill_(closed, -torch.inf).argmax(-1, keepdim=True)
        order.append(pick)
        if len(order) == k:
            return torch.cat(order, 1)
        if held is None:
            row = torch.bmm(take_rows(unit, pick), columns)
        else:
            row = take_rows(held, pick)
        covered = torch.maximum(covered, row[:, 0])
        closed = closed.scatter(1, pick, True)
