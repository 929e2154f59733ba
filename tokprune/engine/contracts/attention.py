"""Attention as methods see it: only the rows that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tokprune.operators.attention import attention_rows, received_attention


def visible_rows(
    index: Tensor, keys: int, mask: Tensor | None, window: int | None = None, causal: bool = True
) -> Tensor | None:
    """Keys that some queries see: bool [B, R, keys], or None where they see all.

    ``index`` [B, R]: rows of a mask [.., queries, keys], else places among the ``keys`` tokens.

    ``mask``: as the attention backend was given it: [B or 1, 1, queries, keys] (bool, or added to
    the logits), [B, keys] (real keys; causality is then the backend's own, and so is its
    ``window``), or None (the same, all keys real).
    """
    if mask is not None and mask.dim() == 4:
        # backends cut off columns beyond the keys (PaliGemma of transformers 4 makes one)
        rows = mask[:, 0, :, :keys].expand(len(index), -1, -1)
        rows = rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2]))
        return rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
    if not causal:
        return None if mask is None else mask[:, None, :]
    valid = None if mask is None else mask != 0
    rank = torch.arange(keys, device=index.device)
    rank = rank.expand(len(index), keys) if valid is None else valid.cumsum(1) - 1
    own = rank.gather(1, index)
    allowed = rank[:, None, :] <= own[:, :, None]
    if window is not None:
        allowed = allowed & (own[:, :, None] - rank[:, None, :] < window)
    return allowed if valid is None else allowed & valid[:, None, :]


class Attention:
    """One attention call as a tap sees it; computes only the rows that are asked for.

    ``query`` [B, H, Lq, d] and ``key``, ``value`` [B, Hkv, Lk, d] as the backend gets them
    (after rotary, heads not repeated); ``mask`` as :func:`visible_rows` takes it; ``valid``
    [B, Lk] marks real rows of a vision encoder (None: all). ``bias``: what is added to the logits
    where attention is rectified, [B, Lk] of each key, or the mask itself, which then holds it.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        *,
        causal: bool,
        mask: Tensor | None = None,
        past: int = 0,
        window: int | None = None,
        softcap: float | None = None,
        rotary: Callable[[], tuple[Tensor, Tensor]] | None = None,
        bias: Tensor | None = None,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.scaling, self.causal, self.mask, self.past = scaling, causal, mask, past
        #: gives cos and sin [B, Lq, d] of the decoder's rotary embedding at the queries' positions
        self.rotary = rotary
        self.window, self.softcap = window, softcap
        self.bias = bias

    @property
    def valid(self) -> Tensor | None:
        """[B, Lk] bool: real rows of a vision encoder; None: all."""
        return None if self.causal else self.mask

    @property
    def rows_at_once(self) -> int:
        """Rows of the map, of all heads, that take the room of the queries: who needs many of them
        takes so many at a time."""
        tokens, width = self.query.shape[2:]
        return max(1, tokens * width // max(1, self.key.shape[2]))

    def parts(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Tensors [B, R], the numbers of rows first, :attr:`rows_at_once` columns at a time."""
        return zip(*(tensor.split(self.rows_at_once, 1) for tensor in tensors))

    def rows(self, index: Tensor) -> Tensor:
        """Softmax rows of the queries at ``index`` [B, R]: float32 [B, H, R, L].

        Probabilities over every visible key (causality and padding respected); columns of keys
        that an earlier turn cached are left out of the result, not out of the softmax.
        """
        b, h, length, d = self.query.shape
        gather = index[:, None, :, None].expand(b, h, index.shape[1], d)
        keys = self.key.shape[2]
        rows_of_mask = self.mask is not None and self.mask.dim() == 4
        place = index if rows_of_mask else index + keys - length
        allowed = visible_rows(place, keys, self.mask, self.window, self.causal)
        bias = self.bias
        if bias is not None and bias.dim() == 4:
            own = bias[:, 0, :, :keys].expand(b, -1, -1)
            bias = own.gather(1, index[:, :, None].expand(-1, -1, keys))
        elif bias is not None:
            bias = bias[:, None]
        rows = attention_rows(
            self.query.gather(2, gather), self.key, self.scaling, allowed, self.softcap, bias
        )
        return rows[..., self.past :]

    def received(self, others_only: bool = False) -> Tensor:
        """Mean attention that each key receives from the real queries: float32 [B, L].

        Mean over heads and queries (``others_only``: the token itself left out); the map is made
        :attr:`rows_at_once` at a time and never held whole.
        """
        block = self.rows_at_once
        if not self.causal:
            return received_attention(
                self.query, self.key, self.scaling, key_valid=self.valid, row_valid=self.valid,
                softcap=self.softcap, others_only=others_only, block=block,
            )  # fmt: skip
        batch, tokens = self.query.shape[0], self.query.shape[2]
        total = torch.zeros(batch, tokens, device=self.query.device)
        for part in torch.arange(tokens, device=total.device).split(block):
            index = part.expand(batch, -1)
            rows = self.rows(index).mean(1)
            if others_only:
                rows = rows.scatter(2, index[:, :, None], 0.0)
            total = total + rows.sum(1)
        return total / max(1, tokens - int(others_only))

    def cls_row(self) -> Tensor:
        """Row of the class token (query 0), head by head: float32 [B, H, Lk]."""
        index = torch.zeros(self.query.shape[0], 1, dtype=torch.long, device=self.query.device)
        return self.rows(index)[:, :, 0]
