"""Greedy sets that are relevant, diverse and cover the others at once (TOPS)."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.checks import check_choice, check_points, check_selection
from tokprune.operators.diversity import DENSE_LIMIT
from tokprune.operators.rows import take_rows

__all__ = ["Normalise", "preservation_set"]

Normalise = Literal["mean", "minmax"]

#: rows of the similarities that are worked on at once
_CHUNK = 1024
#: cosines differ by so much from rounding alone
_ROUNDING = 1e-6


@torch.no_grad()
def preservation_set(
    x: Tensor, relevance: Tensor, k: int, alpha: float = 0.5, lam: float = 0.5,
    normalise: Normalise = "mean",
) -> Tensor:  # fmt: skip
    """The most relevant token first, then always the one with the largest r̃ + α·d̃ + λ·c̃: its
    relevance, its distance to the nearest chosen token, and what it covers of the tokens not chosen
    (itself included) beyond what the chosen ones do.

    With F the cosines and m_j the largest of token j to a chosen one, d_i = 1 − m_i and
    c_i = Σ_j max(0, F_ij − m_j) over the j that are not chosen. Each is brought to a common scale
    over the tokens that may be chosen in this step. Prefixes nest: the first j entries are the
    result for k = j. No host synchronisation; the cosines of all pairs are held, of as many sets at
    once as make no more than 8192² (4 bytes each).

    Args:
        x: [*, n, d] token features of any float dtype; the arithmetic is float32. A zero row has
            cosine 0 with all others.
        relevance: [*, n] r, at least 0, of any float dtype; its scale does not matter.
        k: tokens to choose, 1 ≤ k ≤ n.
        alpha, lam: α and λ, weights of diversity and coverage against relevance, at least 0.
        normalise: "mean" divides by the mean, "minmax" stretches to [0, 1]. Where the mean (range)
            of a criterion is no more than rounding makes, it counts 0.

    Returns:
        LongTensor [*, k], selection order; of equal scores the lower index.

    Raises:
        ValueError: ``k``, ``alpha`` or ``lam`` out of range, unknown ``normalise``, or shapes do
            not match.

    Source: TOPS, arXiv 2606.27161v1, Algorithms 1 and 2 ("mean") and its text, section 4.1
    ("minmax"); cosine as the similarity and the zeros are ours.
    """
    check_points(x)
    check_selection(x.shape[:-1], k, None)
    check_choice("normalise", normalise, Normalise)
    if not (alpha >= 0 and lam >= 0):
        raise ValueError(f"alpha is {alpha} and lam {lam}; both should be at least 0")
    if relevance.shape != x.shape[:-1]:
        raise ValueError(
            f"relevance has shape {tuple(relevance.shape)}; it should be {tuple(x.shape[:-1])}, "
            "one number per token"
        )
    n = x.shape[-2]
    unit = normalize(rearrange(x, "... n d -> (...) n d").float(), dim=-1)
    own = relevance.to(x.device).float().reshape(unit.shape[:-1])
    at_once = max(1, DENSE_LIMIT**2 // n**2)
    parts = zip(unit.split(at_once), own.split(at_once))
    order = [_greedy(*part, k, float(alpha), float(lam), normalise == "minmax") for part in parts]
    return torch.cat(order).reshape(*x.shape[:-2], k)


def _greedy(
    unit: Tensor, relevance: Tensor, k: int, alpha: float, lam: float, minmax: bool
) -> Tensor:
    """k dependent steps: [B, k]."""
    n = unit.shape[1]
    cosine = torch.bmm(unit, unit.transpose(1, 2))
    weight = _constants(unit, 1.0, alpha, lam)
    # n terms of coverage, of which rounding makes about half positive
    least = _constants(unit, 0.0, _ROUNDING, n * _ROUNDING / 10)
    covered, gain = torch.full_like(relevance, -torch.inf), torch.zeros_like(relevance)
    score, order = relevance, []
    while True:
        pick = score.argmax(-1, keepdim=True)
        order.append(pick)
        if len(order) == k:
            return torch.cat(order, 1)
        # nothing is left to be covered of a chosen token
        before, covered = covered, torch.maximum(covered, take_rows(cosine, pick)[:, 0])
        covered = covered.scatter_(1, pick, torch.inf)
        if lam:
            gain = _gain(gain, cosine, before, covered, first=len(order) == 1)
        criteria = torch.stack([relevance, 1 - covered, gain.float()])
        score = _score(criteria, covered < torch.inf, n - len(order), weight, least, minmax)


def _constants(like: Tensor, *values: float) -> Tensor:
    """[3, 1, 1] beside the criteria [3, B, n]."""
    return torch.tensor(values)[:, None, None].to(like.device, non_blocking=True)


def _score(
    criteria: Tensor, free: Tensor, left: int, weight: Tensor, least: Tensor, minmax: bool
) -> Tensor:
    """Weighted sum [B, n] of criteria [3, B, n], each scaled over the ``left`` tokens that are
    ``free``; −inf for the others."""
    if minmax:
        low = criteria.masked_fill(~free, torch.inf).amin(-1, keepdim=True)
        scale = criteria.masked_fill(~free, -torch.inf).amax(-1, keepdim=True) - low
        criteria = criteria - low
    else:
        scale = criteria.masked_fill(~free, 0.0).sum(-1, keepdim=True) / left
    factor = torch.where(scale > least, weight / scale, 0.0)
    return (criteria * factor).sum(0).masked_fill_(~free, -torch.inf)


def _gain(gain: Tensor, cosine: Tensor, before: Tensor, covered: Tensor, first: bool) -> Tensor:
    """What every token [B, n] would cover beyond ``covered``. ``gain``: the same beyond
    ``before``, not known at first."""
    if not first and cosine.device.type == "cpu" and not torch.compiler.is_compiling():
        return _less(gain, cosine, before, covered)
    parts = [
        (rows - covered[:, None]).clamp_(min=0).sum(-1) for rows in cosine.split(_CHUNK, dim=1)
    ]
    return torch.cat(parts, 1)


def _less(gain: Tensor, cosine: Tensor, before: Tensor, covered: Tensor) -> Tensor:
    """The same from the tokens whose cover has changed: fewer with every step, how many only the
    device knows, so that this is for the host alone. Differences are summed in float64, where what
    was added is taken away to the last bit."""
    rows, gain = cosine.flatten(0, 1), gain.double()
    old, new = before.flatten(), covered.flatten()
    for part in (new > old).nonzero()[:, 0].split(_CHUNK):
        own = rows[part]
        lost = (own - old[part, None]).clamp_(min=0) - (own - new[part, None]).clamp_(min=0)
        gain = gain.index_add(0, part // covered.shape[1], lost.double(), alpha=-1)
    return gain
