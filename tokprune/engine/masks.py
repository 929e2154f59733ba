"""Attention masks for sequences whose keys are not the ones transformers counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokprune.errors import UnsupportedModelError

SUPPORTED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def check_backend(name: str | None, where: str) -> str:
    """The attention backend, or an error that names those we can mask."""
    if name not in SUPPORTED:
        raise UnsupportedModelError(
            f"attn_implementation={name!r} of the {where} is not supported; use one of "
            + ", ".join(SUPPORTED)
        )
    return name


def decoder_mask(
    backend: str,
    queries: int,
    keys: int,
    valid: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    positions: tuple[Tensor, Tensor] | None = None,
    window: int | None = None,
) -> Tensor | None:
    """Causal mask for the last ``queries`` of ``keys`` cached entries, in the backend's form.

    ``valid`` [B, keys] bool marks real keys (None: all are). ``positions`` = (query [B, q], key
    [B, keys]) rotary positions, for a sliding ``window`` counted in positions.
    Returns None where the backend's own causal path is right.
    """
    if backend.startswith("flash"):
        if window is not None:
            raise UnsupportedModelError(
                "flash attention cannot apply a sliding window to a shortened sequence; load the "
                "model with attn_implementation='sdpa' or config.sliding_window=None"
            )
        return None if valid is None else valid
    plain = queries == 1 or (backend == "sdpa" and queries == keys)
    if plain and valid is None and window is None:
        return None
    rows = torch.arange(keys - queries, keys, device=device)
    seen = torch.arange(keys, device=device)[None, :] <= rows[:, None]
    allowed = seen[None, None]
    if window is not None and positions is not None:
        near = positions[0][:, :, None] - positions[1][:, None, :] < window
        allowed = allowed & near[:, None]
    if valid is not None:
        allowed = allowed & valid[:, None, None, :]
    if backend == "sdpa":
        return allowed
    blocked = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, blocked)


def encoder_mask(
    backend: str, valid: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Mask of a bidirectional encoder layer from key validity [B, T] and bias [B, 1, 1, T]."""
    if bias is None:
        if valid is None:
            return None
        if backend.startswith("flash"):
            return valid
        if backend == "sdpa":
            return valid[:, None, None, :]
        zeros = torch.zeros(valid.shape, dtype=dtype, device=valid.device)
        return zeros.masked_fill_(~valid, torch.finfo(dtype).min)[:, None, None, :]
    if backend.startswith("flash"):
        raise UnsupportedModelError(
            "proportional attention needs an additive bias, which flash attention does not take; "
            "load the model with attn_implementation='sdpa', or set prop_attn=False"
        )
    bias = bias.to(dtype)
    if valid is None:
        return bias
    return bias.masked_fill(~valid[:, None, None, :], torch.finfo(dtype).min)


def backend_of(module: Any) -> str | None:
    """Attention backend a transformers module runs on."""
    return getattr(module.config, "_attn_implementation", None)
