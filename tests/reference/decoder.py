"""A decoder and attention in loops over heads and tokens, caches as plain tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Whole maps [H, Lq, Lk] and outputs [Lq, H·d] of q [Lq, H, d], k and v [Lk, Hkv, d]; the
    last query is that of the last key."""
    maps, outs = [], []
    for head in range(q.shape[1]):
        own = head // (q.shape[1] // k.shape[1])
        logits = q[:, head] @ k[:, own].T / math.sqrt(q.shape[2])
        if causal:
            for i in range(q.shape[0]):
                logits[i, k.shape[0] - q.shape[0] + i + 1 :] = -math.inf
        maps.append(logits.softmax(-1))
        outs.append(maps[-1] @ v[:, own])
    return torch.stack(maps), torch.cat(outs, dim=1)


def heads(x: Tensor, projection: Any, width: int) -> Tensor:
    return projection(x).view(len(x), -1, width)


def rotate(x: Tensor, positions: list[int], base: float) -> Tensor:
    """Rotary embedding of [L, H, d], halves paired."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for row, position in enumerate(positions):
        angle = torch.tensor(
            [position * base ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float32
        )
        first, second = x[row, :, :half], x[row, :, half:]
        out[row, :, :half] = first * angle.cos() - second * angle.sin()
        out[row, :, half:] = second * angle.cos() + first * angle.sin()
    return out


class Decoder:
    """A Llama with a cache per layer: keys rotated where they were computed."""

    def __init__(self, model: Any) -> None:
        self.model, self.lm = model, model.model.language_model
        config = self.lm.config
        rope = getattr(config, "rope_parameters", None) or {}
        self.base = rope.get("rope_theta") or config.rope_theta
        self.cache: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(
            self.lm.layers
        )

    def layer(self, number: int, x: Tensor, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Attention maps [H, L, keys] and output of a layer on the newest tokens [L, D]."""
        layer = self.lm.layers[number]
        attn, normed = layer.self_attn, layer.input_layernorm(x)
        width = attn.head_dim
        q = rotate(heads(normed, attn.q_proj, width), positions, self.base)
        k = rotate(heads(normed, attn.k_proj, width), positions, self.base)
        v = heads(normed, attn.v_proj, width)
        old_k, old_v = self.cache[number]
        if old_k.numel():
            k, v = torch.cat([old_k, k]), torch.cat([old_v, v])
        self.cache[number] = (k, v)
        maps, out = attention(q, k, v, causal=True)
        x = x + attn.o_proj(out)
        return maps, x + layer.mlp(layer.post_attention_layernorm(x))

    def logits(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.lm.norm(x[-1:]))[0]
