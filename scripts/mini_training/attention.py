"""Attention for training on CPU: one picture at a time, so that its scores stay in the cache.

The fused CPU kernel's backward pass takes more than twice as long at these sizes (576 tokens, heads
of 32). On CUDA the fused kernels are used as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "one_picture_at_a_time"


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        q = q * scale
        out = torch.empty_like(v)
        shares = []
        for b in range(q.shape[0]):
            score = torch.bmm(q[b], k[b].transpose(1, 2))
            if bias is not None:
                score += bias[b]
            share = torch.softmax(score, -1)
            shares.append(share)
            out[b] = torch.bmm(share, v[b])
        ctx.save_for_backward(q, k, v, *shares)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, *shares = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for b, share in enumerate(shares):
            dv[b] = torch.bmm(share.transpose(1, 2), grad[b])
            inner = torch.bmm(grad[b], v[b].transpose(1, 2))
            inner = torch._softmax_backward_data(inner, share, -1, share.dtype)
            dq[b] = torch.bmm(inner, k[b])
            dk[b] = torch.bmm(inner.transpose(1, 2), q[b])
        return dq * ctx.scale, dk, dv, None, None


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: [B, H, L, D] in, [B, L, H, D] out. A boolean mask is
    True where a query may attend."""
    bias = attention_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -1e4)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _Attention.apply(query.contiguous(), key.contiguous(), value.contiguous(), bias, scale)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_for(model: Any, device: torch.device) -> None:
    """Switch a model to the attention that suits the device."""
    model.set_attn_implementation(NAME if device.type == "cpu" else "sdpa")
