"""Dominant tokens by [CLS] attention, the rest merged into a few by key similarity (VisionZip)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.bipartite import best_match
from tokprune.operators.checks import check_choice, check_number
from tokprune.operators.rows import take_rows
from tokprune.operators.topk import rank

__all__ = ["Compressed", "Contextual", "Score", "token_scores"]

Score = Literal["cls", "mean_received"]


@dataclass(frozen=True, eq=False)
class Contextual:
    """The tokens that are not dominant, merged into C rows."""

    #: [B, C, D] in the dtype of the hidden states
    out: Tensor
    #: [B, C] long, position of the token that stands for each row
    target: Tensor
    #: [B, M] long, ascending positions of the merged tokens, targets included
    remaining: Tensor
    #: [B, M] long in 0…C−1, the row that each of them joins (−1 when C = 0)
    joined: Tensor


@dataclass(frozen=True, eq=False)
class Compressed:
    """Dominant tokens in positional order, then contextual ones."""

    #: [B, D_n+C, D] in the dtype of the hidden states
    out: Tensor
    #: [B, D_n] long, dominant positions: class token first, then by falling score
    indices: Tensor
    #: [B, D_n+C] long, position that stands for each row
    rows: Tensor
    #: [B, T] long, row that holds each token (−1: merged into none, when C = 0)
    group: Tensor
    #: how the other tokens were merged
    contextual: Contextual


def token_scores(attn: Tensor, score: Score = "cls") -> Tensor:
    """Attention that each token receives, summed over heads.

    Args:
        attn: [B, H, T] from the class token, or [B, H, T, T] the whole map; softmax
            probabilities of any float dtype.
        score: "cls" takes the [CLS] attention; "mean_received" the mean from all other tokens,
            which needs the whole map (towers without a class token).

    Returns:
        [B, T] float32.

    Raises:
        ValueError: ``attn`` has another shape, unknown ``score``.

    Source: VisionZip, arXiv 2412.04467, dominant token selection.
    """
    check_choice("score", score, Score)
    if attn.dim() == 3 and score == "cls":
        return attn.sum(1, dtype=torch.float32)
    if attn.dim() != 4 or attn.shape[-1] != attn.shape[-2]:
        raise ValueError(
            f"attn has shape {tuple(attn.shape)}; score={score!r} needs [B, H, T, T]"
            + (" or [B, H, T]" if score == "cls" else "")
        )
    if score == "cls":
        return attn[:, :, 0].sum(1, dtype=torch.float32)
    own = attn.diagonal(dim1=-2, dim2=-1).sum(1, dtype=torch.float32)
    received = attn.sum((1, 2), dtype=torch.float32) - own
    return received / max(1, attn.shape[-1] - 1)


def dominant(attn: Tensor, count: int, score: Score = "cls", class_token: bool = True) -> Tensor:
    """Positions of the tokens kept as they are, by falling score.

    Args:
        attn: as in ``token_scores``, or its result [B, T].
        count: D_n, tokens to keep, class token included.
        score: see ``token_scores``.
        class_token: position 0 is a class token: it is always kept and comes first.

    Returns:
        LongTensor [B, count]; of equal scores the lower position first.

    Raises:
        ValueError: ``count`` is not in 1…T, and those of ``token_scores``.

    Source: VisionZip, arXiv 2412.04467, dominant token selection.
    """
    scores = attn if attn.dim() == 2 else token_scores(attn, score)
    check_number("count", count, scores.shape[-1])
    if not class_token:
        return rank(scores)[:, :count]
    best = rank(scores[:, 1:])[:, : count - 1] + 1
    return torch.cat([best.new_zeros(best.shape[0], 1), best], dim=1)


def contextual(hidden: Tensor, metric: Tensor, indices: Tensor, count: int) -> Contextual:
    """Merge all tokens that are not dominant into ``count`` of them.

    Targets lie evenly spaced among the remaining tokens. Every other token joins the target of
    greatest cosine similarity. A row is its target plus the mean of the tokens that joined (not a
    common mean), as in the official code.

    Args:
        hidden: [B, T, D] output of the layer, any float dtype; sums in float32.
        metric: [B, T, d] head mean of the layer's keys.
        indices: [B, D_n] long, dominant positions.
        count: C ≥ 0. Above M/2 the targets are the first C of the M = T − D_n remaining tokens.

    Returns:
        A ``Contextual``.

    Raises:
        ValueError: shapes do not match, ``count`` outside 0…M.

    Source: VisionZip, arXiv 2412.04467, contextual tokens merging.
    """
    batch, tokens, width = hidden.shape
    if metric.shape[:2] != hidden.shape[:2]:
        raise ValueError(
            f"metric has shape {tuple(metric.shape)}; it should be ({batch}, {tokens}, d)"
        )
    left = tokens - indices.shape[1]
    if not 0 <= count <= left:
        raise ValueError(f"count is {count}; it should be between 0 and the {left} other tokens")
    device = hidden.device
    taken = torch.zeros(batch, tokens, dtype=torch.int8, device=device).scatter(1, indices, 1)
    remaining = taken.argsort(dim=1, stable=True)[:, :left]
    if count == 0:
        none = remaining.new_full(remaining.shape, -1)
        return Contextual(hidden[:, :0], remaining[:, :0], remaining, none)
    step = max(1, left // count)
    position = torch.arange(left, device=device)
    order = (position % step != 0).to(torch.int8).argsort(stable=True)  # 0, step, 2·step … first
    target, follower = remaining[:, order[:count]], remaining[:, order[count:]]

    unit = normalize(metric.float(), dim=-1)
    near = best_match(unit, follower, target)[1]
    first = torch.arange(batch, device=device)[:, None] * count
    slot = rearrange(near + first, "b m -> (b m)")
    total = torch.zeros(batch * count, width, dtype=torch.float32, device=device)
    joining = take_rows(hidden, follower).float()
    total.index_add_(0, slot, rearrange(joining, "b m d -> (b m) d"))
    number = torch.zeros(batch * count, dtype=torch.float32, device=device)
    number.index_add_(0, slot, torch.ones_like(slot, dtype=torch.float32))
    mean = rearrange(total / number.clamp(min=1)[:, None], "(b c) d -> b c d", c=count)
    out = (take_rows(hidden, target).float() + mean).to(hidden.dtype)

    joined = torch.empty_like(remaining)
    joined[:, order[:count]] = torch.arange(count, device=device)
    joined[:, order[count:]] = near
    return Contextual(out, target, remaining, joined)


def compress(
    hidden: Tensor,
    metric: Tensor,
    attn: Tensor,
    dominant_count: int,
    contextual_count: int,
    score: Score = "cls",
    class_token: bool = True,
) -> Compressed:
    """Dominant tokens in positional order followed by contextual ones.

    Args:
        hidden: [B, T, D] output of the layer.
        metric: [B, T, d] head mean of the layer's keys, bias included, not scaled.
        attn: attention of the layer or scores, see ``dominant``.
        dominant_count: D_n, class token included.
        contextual_count: C.
        score, class_token: see ``dominant``.

    Returns:
        A ``Compressed``; all sizes are static, no synchronisation with the host.

    Raises:
        ValueError: those of ``dominant`` and ``contextual``.

    Source: VisionZip, arXiv 2412.04467, official code.
    """
    indices = dominant(attn, dominant_count, score, class_token)
    merged = contextual(hidden, metric, indices, contextual_count)
    kept = indices.sort(-1).values
    rows = torch.cat([kept, merged.target], dim=1)
    out = torch.cat([take_rows(hidden, kept), merged.out], dim=1)
    group = torch.full(hidden.shape[:2], -1, device=hidden.device)
    group = group.scatter(1, kept, torch.arange(dominant_count, device=kept.device).expand_as(kept))
    shifted = torch.where(merged.joined < 0, -1, merged.joined + dominant_count)
    group = group.scatter(1, merged.remaining, shifted)
    return Compressed(out, indices, rows, group, merged)
