"""Energy-protected merging: redundant tokens (high energy) merge, isolated ones are spared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokprune.operators.bipartite import best_match, removed_by_ratio, unit_rows
from tokprune.operators.checks import check_choice
from tokprune.operators.merging import MergePlan

__all__ = ["EnergyKind", "Split", "energy_bsm", "pitome"]

EnergyKind = Literal["elu", "gauss", "gauss_text", "paper", "elu_sharp"]
Split = Literal["alternate", "halves"]


def energy(
    metric: Tensor,
    margin: float,
    kind: EnergyKind = "elu",
    alpha: float = 1.0,
    block: int = 256,
) -> Tensor:
    """Mean thresholded cosine similarity of each token to all tokens, itself included.

    f(x) of a similarity x, with m the margin and σ = 1 − m:

    - ``elu``: x − m above the margin, α(e^(x−m) − 1) below;
    - ``gauss``: (2·exp(−((1−x)/σ)²) − 1) / (σ√(2π));
    - ``gauss_text``: exp(−½((1−x)/σ)²) / (σ√(2π));
    - ``paper``: x from the margin on, α(e^(x−m) − 1) below (jumps by m at the margin);
    - ``elu_sharp``: ``elu`` of (x − m)/0.01 at margin 0.

    Args:
        metric: [B, T, C], any float dtype; computed in float32 (or wider).
        margin: m.
        kind: f, see above.
        alpha: floor of the ELU forms.
        block: rows of the T×T similarities that are held at a time.

    Returns:
        [B, T] float32 (or wider).

    Raises:
        ValueError: ``metric`` is not [B, T, C]; unknown ``kind``; ``margin`` ≥ 1 with a Gaussian
            form; ``block`` < 1.

    Source: Tran et al. 2024, arXiv 2405.16148, Eq. 4 (``paper``); the other forms are those of
    the authors' code (``elu``), of their logged LLaVA runs (``gauss``) and of their text models.
    """
    return _energy(unit_rows(metric), _threshold(kind, margin, alpha), block)


def pitome(
    metric: Tensor,
    ratio: float | None = None,
    *,
    margin: float,
    r: int | None = None,
    kind: EnergyKind = "elu",
    alpha: float = 1.0,
    class_token: bool = False,
    split: Split = "alternate",
) -> MergePlan | None:
    """Merge r of the 2r tokens of highest energy into the other r, and protect the rest.

    Args:
        metric: [B, T, C].
        ratio: fraction of tokens to keep; :func:`removed_by_ratio` of the tokens without the
            class token go. Give ``ratio`` or ``r``.
        margin, kind, alpha: see :func:`energy`.
        r: tokens to remove.
        class_token: position 0 has no part in energies and leads the output.
        split: of the 2r tokens in order of energy, sources are every second (``alternate``) or
            the first half (``halves``).

    Returns:
        The plan, or None where no token goes (r < 1). Output rows: class token, protected tokens
        by falling energy, destinations by falling energy.

    Raises:
        ValueError: 2r > T, naming ``ratio`` or ``r``; both or neither given; unknown ``split``;
            and those of :func:`energy`.

    Source: Tran et al. 2024, arXiv 2405.16148, section 3.2, Algorithm 1.
    """
    check_choice("split", split, Split)
    threshold = _threshold(kind, margin, alpha)
    unit = unit_rows(metric)
    tokens = unit.shape[1] - class_token
    r = _count(tokens, ratio, r, tokens // 2)
    if r < 1:
        return None
    order = energy_order(unit, threshold, class_token)
    protected = order[:, 2 * r :]
    if split == "alternate":
        src, dst = order[:, 0 : 2 * r : 2], order[:, 1 : 2 * r : 2]
    else:
        src, dst = order[:, :r], order[:, r : 2 * r]
    slot = best_match(unit, src, dst)[1]
    return MergePlan(_lead(protected, class_token), src, dst, slot, unit.shape[1])


def energy_bsm(
    metric: Tensor,
    ratio: float | None = None,
    *,
    margin: float,
    r: int | None = None,
    kind: EnergyKind = "elu",
    alpha: float = 1.0,
    class_token: bool = False,
) -> MergePlan | None:
    """Bipartite soft matching between even and odd ranks of energy; no token is protected.

    Args and Returns as :func:`pitome`. Output rows: class token, sources that stay by falling
    similarity, destinations by falling energy.

    Raises:
        ValueError: more merges than sources, naming ``ratio`` or ``r``; both or neither given;
            and those of :func:`energy`.

    Source: Tran et al. 2024, arXiv 2405.16148, as its authors run DeiT and MAE.
    """
    threshold = _threshold(kind, margin, alpha)
    unit = unit_rows(metric)
    tokens = unit.shape[1] - class_token
    r = _count(tokens, ratio, r, min((tokens + 1) // 2, tokens - 1))
    if r < 1:
        return None
    order = energy_order(unit, threshold, class_token)
    evens, odds = order[:, 0::2], order[:, 1::2]
    best, match = best_match(unit, evens, odds)
    rank = best.argsort(dim=-1, descending=True, stable=True)
    keep = _lead(evens.gather(1, rank[:, r:]), class_token)
    src, slot = evens.gather(1, rank[:, :r]), match.gather(1, rank[:, :r])
    return MergePlan(keep, src, odds, slot, unit.shape[1])


def energy_order(unit: Tensor, threshold: Callable[[Tensor], Tensor], class_token: bool) -> Tensor:
    """Positions [B, T − class_token] by falling energy, ties in position order."""
    free = unit[:, int(class_token) :]
    order = _energy(free, threshold).argsort(dim=-1, descending=True, stable=True)
    return order + int(class_token)


def _energy(unit: Tensor, threshold: Callable[[Tensor], Tensor], block: int = 256) -> Tensor:
    if block < 1:
        raise ValueError(f"block={block} must be at least 1")
    if not unit.shape[1]:
        return unit.new_zeros(unit.shape[:2])
    return torch.cat([threshold(rows @ unit.mT).mean(-1) for rows in unit.split(block, 1)], dim=1)


def _threshold(kind: EnergyKind, margin: float, alpha: float) -> Callable[[Tensor], Tensor]:
    """f of :func:`energy`; may work in place on the similarities it is given."""
    check_choice("kind", kind, EnergyKind)
    if kind == "elu":
        return lambda x: F.elu(x.sub_(margin), alpha, inplace=True)
    if kind == "elu_sharp":
        return lambda x: F.elu(x.sub_(margin).div_(0.01), alpha, inplace=True)
    if kind == "paper":
        return lambda x: torch.where(x >= margin, x, alpha * (x - margin).expm1_())
    sigma = 1 - margin
    if sigma <= 0:
        raise ValueError(f"margin={margin} must be below 1 for kind={kind!r} (σ = 1 − margin)")
    scale = 1 / (sigma * math.sqrt(2 * math.pi))
    if kind == "gauss":
        return lambda x: x.sub_(1).div_(sigma).square_().neg_().exp_().mul_(2 * scale).sub_(scale)
    return lambda x: x.sub_(1).div_(sigma).square_().mul_(-0.5).exp_().mul_(scale)


def _count(tokens: int, ratio: float | None, r: int | None, most: int) -> int:
    """Tokens to remove, from whichever of ``ratio`` and ``r`` is given."""
    if (ratio is None) == (r is None):
        raise ValueError(f"give one of ratio and r, not ratio={ratio} and r={r}")
    asked = f"r={r}"
    if r is None:
        assert ratio is not None
        r, asked = removed_by_ratio(tokens, ratio), f"ratio={ratio}"
    if r > most:
        raise ValueError(
            f"{asked} removes {r} of {tokens} mergeable tokens, but one merge can remove at most "
            f"{most}; keep at least {tokens - most}"
        )
    return r


def _lead(keep: Tensor, class_token: bool) -> Tensor:
    return F.pad(keep, (1, 0)) if class_token else keep
