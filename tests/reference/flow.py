"""FlowCut over whole attention maps, one image after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference.attention import full_map


def attn_terms(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[CLS] attention [B, N], its value similarity [B, N], head-mean values [B, N, d]."""
    attention = full_map(q, k).mean(1)[:, 0, 1:]
    semantic = (v[:, :, :1] @ v.transpose(-1, -2)).softmax(-1).mean(1)[:, 0, 1:]
    return attention, semantic, v.mean(1)[:, 1:]


def flow_score(a: Tensor, s: Tensor, u: Tensor) -> Tensor:
    share = a / a.sum(-1, keepdim=True) + s / s.sum(-1, keepdim=True)
    return share * u.norm(p=1, dim=-1)


def raw_prune_count(attention: Tensor, remaining: int, target: int) -> float:
    """The number before rounding, of one image [n]."""
    n = len(attention)
    if n <= target:
        return 0.0
    p = (attention / attention.sum()).double()
    h = float(-torch.special.xlogy(p, p).sum()) / math.log(n)
    return (n - target) / math.sqrt(remaining) * (1 - h * h)


def prune_count(attention: Tensor, remaining: int, target: int) -> Tensor:
    """[B]: the largest count of the batch, as the official code has it."""
    counts = [round(raw_prune_count(row, remaining, target)) for row in attention]
    return torch.tensor([max(counts)] * len(counts))


def encoder_keep(score: Tensor, attention: Tensor, remaining: int, target: int) -> Tensor:
    n = attention.shape[1] - int(prune_count(attention, remaining, target)[0])
    return score.topk(max(n, target), dim=-1).indices.sort(-1).values


def global_query_terms(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    logits = q.mean(-2, keepdim=True) @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return logits.softmax(-1).mean(1)[:, 0], v.mean(1)


def llm_select(
    q: Tensor, k: Tensor, v: Tensor, start: int, n: int, last: int, target: int
) -> Tensor:
    """[..., target]: visual tokens that stay after a decoder layer, relative to ``start``.

    q [..., H, L, d], k and v [..., Hkv, L, d]; the token at ``last`` looks at the n visual tokens
    alone. Of equal scores the lower position.
    """
    k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], dim=-3) for t in (k, v))
    block, row = slice(start, start + n), slice(last, last + 1)
    keys, values, scale = k[..., block, :], v[..., block, :], math.sqrt(q.shape[-1])
    a = (q[..., row, :] @ keys.mT / scale).softmax(-1).mean(-3).squeeze(-2)
    s = (v[..., row, :] @ values.mT / scale).softmax(-1).mean(-3).squeeze(-2)
    order = flow_score(a, s, values.mean(-3)).sort(dim=-1, descending=True, stable=True).indices
    return order[..., :target].sort(-1).values
