"""Bipartite matchings: sources on one side, destinations on the other, best pairs merge."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokprune.operators.kernels import available
from tokprune.operators.merging import MergePlan
from tokprune.operators.rows import take_rows

__all__ = ["bipartite_soft_matching", "parse_r", "removed_by_ratio"]


def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> MergePlan | None:
    """Merge the r even-position tokens that are most similar to an odd-position token.

    Args:
        metric: [B, T, C] features to compare, any float dtype (scored in float32 or wider).
        r: tokens to remove; clamped to (T − protected) // 2.
        class_token: position 0 is never merged, and kept tokens stay in their order. Without it
            they leave in order of falling similarity.
        distill_token: no token joins position 1, and positions 0 and 1 lead the output.

    Returns:
        The plan, or None where there is nothing to merge (r ≤ 0 after the clamp).

    Raises:
        ValueError: ``metric`` is not [B, T, C].

    Zero vectors are similar to nothing (similarity 0); the published code turns them into NaN.

    Source: Bolya et al. 2023, arXiv 2210.09461, section 3 (bipartite soft matching).
    """
    unit = unit_rows(metric)
    batch, tokens = unit.shape[:2]
    r = min(r, (tokens - class_token - distill_token) // 2)
    if r <= 0:
        return None
    best, match = best_neighbour(unit[:, ::2], unit[:, 1::2], barred=int(distill_token))
    if class_token:
        best[:, 0] = -math.inf
    order = best.argsort(dim=-1, descending=True, stable=True)
    joining, staying = order[:, :r], order[:, r:]
    if class_token:
        staying = staying.sort(-1).values
    return MergePlan(
        keep=2 * staying,
        src=2 * joining,
        dst=torch.arange(1, tokens, 2, device=unit.device).expand(batch, -1),
        slot=match.gather(1, joining),
        tokens=tokens,
        distill=distill_token,
    )


def parse_r(layers: int, r: int | Sequence[int] | tuple[int, float]) -> list[int]:
    """Tokens to remove at each layer.

    Args:
        layers: number of layers L.
        r: int: the same at each layer; tuple (r, inflect): linear around r, from 2r to 0 for
            inflect −1, from 0 to 2r for +1; other sequence: one value a layer, padded with zeros
            (a longer one is returned whole).

    Raises:
        ValueError: ``layers`` < 1, or a tuple that is not (r, inflect).

    Source: Bolya et al. 2023, arXiv 2210.09461, section 4.1 (merging schedule).
    """
    if layers < 1:
        raise ValueError(f"layers={layers} must be at least 1")
    if isinstance(r, int):
        return [r] * layers
    if not isinstance(r, tuple):
        return list(r) + [0] * (layers - len(r))
    if len(r) != 2:
        raise ValueError(f"r={r} must be (r, inflect); give one value a layer as a list")
    if layers == 1:
        return [int(r[0])]
    low = int(r[0] * (1 - r[1]))
    step = (2 * r[0] - low - low) / (layers - 1)
    return [int(low + step * i) for i in range(layers)]


def removed_by_ratio(tokens: int, ratio: float) -> int:
    """Tokens that go when a fraction ``ratio`` stays: ⌊T − T·ratio⌋ in double precision.

    0 for ratio ≥ 1.

    Raises:
        ValueError: ``ratio`` is not positive.

    Source: Tran et al. 2024, arXiv 2405.16148, section 3.2.
    """
    if not ratio > 0:
        raise ValueError(f"ratio={ratio} must be positive: the fraction of tokens to keep")
    return 0 if ratio >= 1 else math.floor(tokens - tokens * ratio)


def unit_rows(metric: Tensor) -> Tensor:
    """Rows of ``metric`` [B, T, C] at length one, in float32 (or wider), without gradient.

    Raises:
        ValueError: not [B, T, C].
    """
    if metric.ndim != 3:
        raise ValueError(f"metric has shape {tuple(metric.shape)}; it must be [B, T, C]")
    wide = metric.detach().to(torch.promote_types(metric.dtype, torch.float32))
    return F.normalize(wide, dim=-1)


def best_match(unit: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """Score [B, n] and slot [B, n] of the most similar of the rows ``dst`` for each row ``src``."""
    return best_neighbour(take_rows(unit, src), take_rows(unit, dst))


def best_neighbour(a: Tensor, b: Tensor, barred: int = 0) -> tuple[Tensor, Tensor]:
    """Largest product [B, n] of each row of ``a`` [B, n, C] with a row of ``b`` [B, m, C], and
    which row that is [B, n] long; of equal ones the lower.

    ``barred``: so many rows of ``b``, from the first, are nobody's neighbour.
    """
    if a.dtype == b.dtype == torch.float32 and b.shape[1] and available(a, b):
        from tokprune.operators.kernels import match

        return match.best_neighbour(a, b, barred)
    scores = a @ b.mT
    if barred:
        scores[..., :barred] = -math.inf
    best, slot = scores.max(-1)
    return best, slot
