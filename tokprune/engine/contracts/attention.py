"""Attention as methods see it: only the rows that are asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokprune.operators.attention import attention_rows


def visible_rows(
    index: Tensor, keys: int, valid: Tensor | None, window: tuple[Tensor, int] | None
) -> Tensor:
    """Keys that causal queries at ``index`` [B, R] among ``keys`` tokens see: bool [B, R, keys].

    ``valid`` [B, keys]: real keys (None: all); ``window``: rotary positions [B, keys] and width
    where attention slides.
    """
    allowed = torch.arange(keys, device=index.device)[None, None, :] <= index[:, :, None]
    if window is not None:
        position, width = window
        own = position.gather(1, index)
        allowed = allowed & (own[:, :, None] - position[:, None, :] < width)
    return allowed if valid is None else allowed & valid[:, None, :]


class Attention:
    """One attention call as a tap sees it; computes only the rows that are asked for.

    ``query`` [B, H, Lq, d] and ``key``, ``value`` [B, Hkv, Lk, d] as the backend gets them
    (after rotary, heads not repeated); ``valid`` [B, Lk] marks real keys (None: all).
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        *,
        causal: bool,
        valid: Tensor | None,
        past: int = 0,
        window: tuple[Tensor, int] | None = None,
        rotary: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.scaling, self.causal, self.valid, self.past = scaling, causal, valid, past
        #: gives cos and sin [B, Lq, d] of the decoder's rotary embedding at the queries' positions
        self.rotary = rotary
        #: (rotary positions of the keys [B, Lk], width) where attention slides
        self.window = window

    def rows(self, index: Tensor) -> Tensor:
        """Softmax rows of the queries at ``index`` [B, R]: float32 [B, H, R, L].

        Probabilities over every visible key (causality and padding respected); columns of keys
        that an earlier turn cached are left out of the result, not out of the softmax.
        """
        b, h, length, d = self.query.shape
        gather = index[:, None, :, None].expand(b, h, index.shape[1], d)
        keys = self.key.shape[2]
        allowed = None if self.valid is None else self.valid[:, None, :]
        if self.causal:
            allowed = visible_rows(index + keys - length, keys, self.valid, self.window)
        rows = attention_rows(self.query.gather(2, gather), self.key, self.scaling, allowed)
        return rows[..., self.past :]

    def received(self, others_only: bool = False, block: int = 64) -> Tensor:
        """Mean attention that each key receives from the real queries: float32 [B, L].

        Mean over heads and queries (``others_only``: the token itself left out); the map is made
        ``block`` rows at a time and never held whole.
        """
        batch, tokens = self.query.shape[0], self.query.shape[2]
        arange = torch.arange(tokens, device=self.query.device)
        total = torch.zeros(batch, tokens, device=arange.device)
        for part in arange.split(block):
            index = part.expand(batch, -1)
            rows = self.rows(index).mean(1)
            if others_only:
                rows = rows.scatter(2, index[:, :, None], 0.0)
            if self.valid is not None:
                rows = rows.masked_fill(~self.valid[:, part, None], 0.0)
            total = total + rows.sum(1)
        real = tokens if self.valid is None else self.valid.sum(1, keepdim=True)
        return total / (real - others_only if others_only else real)

    def cls_row(self) -> Tensor:
        """Row of the class token (query 0), head by head: float32 [B, H, Lk]."""
        index = torch.zeros(self.query.shape[0], 1, dtype=torch.long, device=self.query.device)
        return self.rows(index)[:, :, 0]
