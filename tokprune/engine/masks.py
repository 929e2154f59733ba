"""Attention masks of a shortened sequence: those that the model made, indexed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokprune.errors import UnsupportedModelError

SUPPORTED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def backend_of(module: Any) -> str | None:
    """Attention backend a transformers module runs on now."""
    return getattr(module.config, "_attn_implementation", None)


def check_backend(name: str | None, where: str) -> str:
    """The attention backend, or an error that names those we can mask."""
    if name not in SUPPORTED:
        raise UnsupportedModelError(
            f"attn_implementation={name!r} of the {where} is not supported; use one of "
            + ", ".join(SUPPORTED)
        )
    return name


def at(mask: Tensor, queries: Tensor, keys: Tensor, total: int) -> Tensor:
    """Rows and columns of a mask that the model made for the whole conversation.

    Its last row and column belong to the last of ``total`` tokens: masks of sliding caches are
    narrower than the conversation. Those of static caches are wider: they have columns for tokens
    to come.

    Args:
        mask: [B or 1, 1, q, k], bool (True: visible) or added to the logits; or [B or 1, k], keys
            that are no padding.
        queries: [B, n] column of each query, −1 = padding.
        keys: [B, m] column of each key, −1 = padding.

    Returns:
        The same form: [B, 1, n, m] or [B, m]; padding keys, and those without a column in the
        mask, are hidden.
    """
    width = mask.shape[-1]
    place = (keys - max(0, total - width)).to(mask.device)
    gone = (place < 0) | (place >= width) | (keys < 0).to(mask.device)
    place = place.clamp(0, width - 1)
    if mask.dim() == 2:
        return mask.expand(len(keys), -1).gather(1, place).masked_fill(gone, 0)
    mask = mask.expand(len(keys), -1, -1, -1)
    row = (queries - (total - mask.shape[-2])).clamp(min=0).to(mask.device)
    rows = mask.gather(2, row[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    both = rows.gather(3, place[:, None, None, :].expand(-1, rows.shape[1], rows.shape[2], -1))
    return both.masked_fill(gone[:, None, None, :], _blocked(both.dtype))


def columns(mask: Tensor, keys: Tensor) -> Tensor:
    """:func:`at` for all rows of a mask [B or 1, 1, q, k] and ``keys`` [B, m] that it has columns
    for, −1 = padding."""
    batch, m = keys.shape
    place = keys.clamp(min=0)[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], m)
    taken = mask.expand(batch, -1, -1, -1).gather(3, place)
    return taken.masked_fill((keys < 0)[:, None, None, :], _blocked(mask.dtype))


def causal(backend: str, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of a model that made none, where some of ``keys`` [B, m] are padding (−1), for
    ``queries`` [B, n]: in the backend's form."""
    if backend.startswith("flash"):
        return (keys >= 0) & (keys <= queries[:, -1:])  # static caches have room behind
    seen = (queries[:, :, None] >= keys[:, None, :]) & (keys >= 0)[:, None, :]
    return in_form(backend, seen[:, None], dtype)


def in_form(backend: str, allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask [B, 1, n, m] bool in the form that the backend takes."""
    if backend == "sdpa":
        return allowed
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill_(~allowed, _blocked(dtype))


def moved_window(own: Tensor, base: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """The mask [B, 1, n, m] of a sliding window that is counted where positions were closed up: of
    what ``base`` shows, which knows no window, the ``near`` [B, n, m] bool; and of what is ``far``
    in the model's own counting, also what its ``own`` mask shows."""
    base = base.masked_fill(~near[:, None].to(base.device), _blocked(base.dtype)).to(own.device)
    return torch.where(far[:, None].to(own.device), torch.maximum(base, own), base)


def _blocked(dtype: torch.dtype) -> Any:
    return False if dtype == torch.bool else torch.finfo(dtype).min


def encoder_mask(
    backend: str, valid: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Mask of a bidirectional encoder layer from key validity [B, T] and bias [B, 1, 1, T]."""
    if bias is None:
        if valid is None:
            return None
        if backend.startswith("flash"):
            return valid
        return in_form(backend, valid[:, None, None, :], dtype)
    if backend.startswith("flash"):
        raise UnsupportedModelError(
            "proportional attention needs an additive bias, which flash attention does not take; "
            "load the model with attn_implementation='sdpa', or set prop_attn=False"
        )
    bias = bias.to(dtype)
    if valid is None:
        return bias
    return bias.masked_fill(~valid[:, None, None, :], torch.finfo(dtype).min)
