"""Whole attention maps, and scores of image tokens read from them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def full_map(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    """The whole softmax map [B, H, L, L], as eager attention makes it."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(later, -math.inf)
    return logits.softmax(-1)


def cls_pivot(q: Tensor, k: Tensor) -> Tensor:
    return full_map(q, k)[:, :, 0, 1:].mean(1).argmax(-1)


def text_to_image_ratio(q: Tensor, k: Tensor, text: Tensor, visual: Tensor) -> Tensor:
    """[B]: share of the attention from ``text`` [B, L] that goes to ``visual`` [B, L]; NaN without
    text."""
    attention = full_map(q, k, causal=True).mean(1)
    mass = torch.einsum("bi,bij,bj->b", text.float(), attention, visual.float())
    return mass / text.sum(1)


def transition_weight(before: Tensor, after: Tensor) -> Tensor:
    magnitude = after.norm(dim=-1) / before.norm(dim=-1)
    direction = torch.exp(1 - F.cosine_similarity(before, after, dim=-1))
    return magnitude * direction / direction.sum(-1, keepdim=True)


def instruction_attention(q: Tensor, k: Tensor, start: int, n: int) -> Tensor:
    """[B, n]: attention from the text after the image block, as a share of the block's sum."""
    a = full_map(q, k, causal=True)[:, :, start + n :].mean((1, 2))[:, start : start + n]
    return a / (a.sum(-1, keepdim=True) + 1e-8)


def transition_score(ttv: list[Tensor], iga: Tensor, alpha: float) -> Tensor:
    total = torch.stack(ttv).sum(0)
    total = total / (total.sum(-1, keepdim=True) + 1e-8)
    return alpha * total + (1 - alpha) * iga


def fastv(q: Tensor, k: Tensor, start: int, n: int, keep: int) -> Tensor:
    """[B, keep]: image tokens to which the last token attends most, ascending."""
    row = full_map(q, k, causal=True).mean(1)[:, -1]
    return row[:, start : start + n].topk(keep).indices.sort(-1).values + start


def segment_topk(score: Tensor, segment: Tensor, budget: Tensor) -> Tensor:
    """[B, L] bool: the highest scores of each segment; of equal scores the lower position."""
    mask = torch.zeros_like(segment, dtype=torch.bool)
    for b in range(score.shape[0]):
        for s in range(budget.shape[1]):
            place = (segment[b] == s).nonzero()[:, 0]
            best = score[b, place].sort(descending=True, stable=True).indices
            mask[b, place[best[: max(0, int(budget[b, s]))]]] = True
    return mask
