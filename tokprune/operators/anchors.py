"""Clusters of what a reduction leaves out: distinctive anchors, and the nearest kept token."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.checks import check_choice, check_number, check_points
from tokprune.operators.rows import take_rows
from tokprune.operators.topk import rank

__all__ = ["Clusters", "Place", "Superior", "clusters_around", "distinctive_anchors", "nearest"]

Superior = Literal["lower", "higher"]
Place = Literal["first", "median", "last"]

#: rows of a similarity map that are held at a time
_BLOCK = 512


class Clusters(NamedTuple):
    """A partition of n tokens into K clusters."""

    #: [*, K] long, the tokens that clusters formed around, ascending
    anchors: Tensor
    #: [*, n] long, the cluster of every token
    cluster: Tensor
    #: [*, K, d] float32, the mean of a cluster's tokens
    merged: Tensor
    #: [*, K] long, tokens of a cluster
    size: Tensor

    def place(self, rule: Place = "median") -> Tensor:
        """[*, K] long: of every cluster the first, the (lower) median or the last token."""
        check_choice("rule", rule, Place)
        order = self.cluster.sort(dim=-1, stable=True).indices
        before = self.size.cumsum(-1) - self.size
        inside = {"first": 0 * self.size, "median": (self.size - 1) // 2, "last": self.size - 1}
        return order.gather(-1, before + inside[rule])


@torch.no_grad()
def nearest(x: Tensor, kept: Tensor, segment: Tensor | None = None) -> Tensor:
    """The kept token that every token resembles most, by cosine similarity.

    Args:
        x: [*, n, d] of any float dtype; the arithmetic is float32, some rows of the map at a time.
        kept: [*, k] long, rows of those kept, −1 for none; a kept token is its own nearest.
        segment: [*, n] long, the part that each token belongs to: it joins one of its own; None:
            any.

    Returns:
        [*, n] long in 0 … k−1, the first of equals; −1 for a token that may join none.

    Raises:
        ValueError: ``x`` is not [*, n, d], or ``kept`` not [*, k] with the same leading dimensions.

    Source: ours for what is not merged; the assignment of ERA, arXiv 2606.31982, figure 2b, and
    RESTORE, arXiv 2606.01711, eq. 8.
    """
    check_points(x)
    if kept.shape[:-1] != x.shape[:-2] or not kept.shape[-1]:
        raise ValueError(
            f"kept has shape {tuple(kept.shape)}; with x {tuple(x.shape)} it should be "
            f"{(*x.shape[:-2], 'k')}, k at least 1"
        )
    unit, place, none = normalize(x.float(), dim=-1), kept.clamp(min=0), (kept < 0)[..., None, :]
    own = take_rows(unit, place).transpose(-1, -2)
    parts = []
    for start in range(0, x.shape[-2], _BLOCK):
        rows = slice(start, start + _BLOCK)
        similar = (unit[..., rows, :] @ own).masked_fill_(none, -torch.inf)
        if segment is not None:
            apart = segment[..., rows, None] != segment.gather(-1, place)[..., None, :]
            similar = similar.masked_fill_(apart, -torch.inf)
        best = similar.max(-1)
        parts.append(best.indices.masked_fill(best.values == -torch.inf, -1))
    # a spare entry for the rows of none
    found = torch.cat([*parts, parts[0][..., :1]], -1)
    number = torch.arange(kept.shape[-1], device=x.device).expand_as(kept)
    found = found.scatter(-1, torch.where(kept < 0, x.shape[-2], kept), number)
    return found[..., :-1]


@torch.no_grad()
def clusters_around(x: Tensor, anchors: Tensor) -> Clusters:
    """Every token joins the anchor that it resembles most; clusters are plain means.

    Args:
        x: [*, n, d] of any float dtype.
        anchors: [*, K] long, ascending.

    Source: RESTORE, arXiv 2606.01711, eq. 8; ERA, arXiv 2606.31982, figure 2b.
    """
    cluster = nearest(x, anchors)
    size = torch.zeros_like(anchors).scatter_add(-1, cluster, torch.ones_like(cluster))
    total = x.new_zeros(*anchors.shape, x.shape[-1], dtype=torch.float32)
    index = cluster[..., None].expand(*cluster.shape, x.shape[-1])
    merged = total.scatter_add(-2, index, x.float()) / size[..., None]
    return Clusters(anchors, cluster, merged, size)


@torch.no_grad()
def distinctive_anchors(x: Tensor, k: int, superior: Superior = "lower") -> Clusters:
    """The k tokens that stand for many others and resemble none that stands for fewer (or more).

    A token's density is the sum of its cosines to all; its likeness the largest cosine to a token
    of lower density (0 for the one that has the lowest); anchors have the largest density ·
    (1 − likeness). The map of similarities is made some rows at a time, never held.

    Args:
        x: [*, n, d] tokens of any float dtype; the arithmetic is float32. Tokens of length 0
            resemble none.
        k: anchors, 1 ≤ k ≤ n.
        superior: "lower" compares with tokens of lower density, as the official code does;
            "higher" as the paper's equation 6 has it.

    Raises:
        ValueError: ``x`` is not [*, n, d], k is out of range, or an unknown ``superior``.

    Source: RESTORE, "Improving Visual Token Reduction via Rectifying Distortions", ICML 2026,
    arXiv 2606.01711, eqs. 5–8, and its official code.
    """
    check_points(x)
    check_number("k", k, x.shape[-2])
    check_choice("superior", superior, Superior)
    unit = normalize(x.float(), dim=-1)
    blocks = [slice(start, start + _BLOCK) for start in range(0, x.shape[-2], _BLOCK)]
    other = unit.transpose(-1, -2)
    density = torch.cat([(unit[..., rows, :] @ other).sum(-1) for rows in blocks], -1)
    likeness = []
    for rows in blocks:
        own, all_ = density[..., rows, None], density[..., None, :]
        outside = all_ >= own if superior == "lower" else all_ <= own
        best = (unit[..., rows, :] @ other).masked_fill_(outside, -torch.inf).amax(-1)
        likeness.append(best.masked_fill_(best == -torch.inf, 0.0))
    score = density * (1 - torch.cat(likeness, -1))
    top = rank(score)[..., :k]
    return clusters_around(x, top.sort(-1).values)
