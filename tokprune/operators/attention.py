"""The few rows of an attention map that a method needs, never the map itself."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.operators.checks import check_mask
from tokprune.operators.kernels import available

__all__ = ["attention_rows", "mean_rows", "received_attention"]


def attention_rows(
    q_rows: Tensor, k: Tensor, scaling: float | None = None, allowed: Tensor | None = None,
    softcap: float | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of some query rows over all allowed keys, in float32.

    Grouped keys are read in place, without a repeated copy.

    Args:
        q_rows: [..., H, R, d] queries of the rows wanted, any float dtype, rotary applied.
        k: [..., Hkv, L, d] all keys, same leading dimensions and d.
        scaling: factor of the logits; None means 1/√d.
        allowed: [..., R, L] or [..., 1, L] bool, True where a row may look; None means everywhere.
        softcap: bound c of the logits, c · tanh(x / c) (Gemma 2); None means none.
        bias: [..., R, L] or [..., 1, L], added to the logits of all heads; None means none.

    Returns:
        [..., H, R, L] float32; a row sums to 1, a row with no allowed key is all 0.

    Raises:
        ValueError: dimensions of ``q_rows`` and ``k`` do not match, H is not a multiple of Hkv, or
            ``allowed`` is not bool.

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1.
    """
    *lead, heads, rows, width = q_rows.shape
    groups = _groups(q_rows, k)
    scale = width**-0.5 if scaling is None else scaling
    q = (q_rows.float() * scale).reshape(*lead, k.shape[-3], groups * rows, width)
    logits = torch.matmul(q, k.float().transpose(-1, -2))
    logits = logits.reshape(*lead, heads, rows, k.shape[-2])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.float().unsqueeze(-3)
    if allowed is None:
        return logits.softmax(-1)
    if allowed.dtype != torch.bool:
        raise ValueError(f"allowed has dtype {allowed.dtype}; it should be torch.bool")
    return masked_softmax(logits, allowed.logical_not().unsqueeze(-3))


def masked_softmax(logits: Tensor, hidden: Tensor) -> Tensor:
    """Softmax over the last dimension without the ``hidden`` entries, which get 0; ``logits`` are
    overwritten: there may be many of them."""
    # The second fill turns the NaN of rows without any key into 0; elsewhere it changes nothing.
    return logits.masked_fill_(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)


def mean_rows(probs: Tensor, row_valid: Tensor | None = None) -> Tensor:
    """Attention that each key receives: mean over heads, then over rows.

    Args:
        probs: [..., H, R, L] attention rows.
        row_valid: [..., R] bool, rows that count; None means all.

    Returns:
        [..., L] float32; 0 everywhere where no row counts.

    Raises:
        ValueError: ``row_valid`` is not bool [..., R].

    Source: TransPrune, arXiv 2507.20630 (instruction-guided attention); FastV, arXiv 2403.06764,
    §4.1, with one row.
    """
    heads = probs.float().mean(-3)
    if row_valid is None:
        return heads.sum(-2) / max(1, heads.shape[-2])
    check_mask("row_valid", row_valid, heads.shape[:-1])
    total = heads.masked_fill(~row_valid[..., None], 0.0).sum(-2)
    return total / row_valid.sum(-1, keepdim=True).clamp(min=1)


def received_attention(
    q_rows: Tensor, k: Tensor, scaling: float | None = None, *, causal: bool = False,
    place: Tensor | None = None, key_valid: Tensor | None = None, row_valid: Tensor | None = None,
    softcap: float | None = None, others_only: bool = False, block: int = 64,
) -> Tensor:  # fmt: skip
    """Mean attention that each key receives from many query rows, without the map.

    The mean is over heads and over the rows that count. On a GPU a kernel makes two passes over
    blocks of logits and holds one number per head and row or key; otherwise ``block`` rows of the
    map are held at a time.

    Args:
        q_rows: [B, H, R, d] queries of the rows, any float dtype, rotary applied.
        k: [B, Hkv, L, d] all keys.
        scaling: factor of the logits; None means 1/√d.
        causal: a row sees the keys up to its own place.
        place: [B, R] long in 0…L−1, the row's own key; None means the last R keys, in order.
        key_valid: [B, L] bool, keys that are there; None means all.
        row_valid: [B, R] bool, rows that count; None means all.
        softcap: bound c of the logits, c · tanh(x / c) (Gemma 2); None means none.
        others_only: what a row gives its own key does not count, nor does one row of the mean.
        block: rows of the map that are held at a time without a kernel.

    Returns:
        [B, L] float32; rows without a key they see give nothing.

    Raises:
        ValueError: shapes or dtypes do not match, H is not a multiple of Hkv, R > L without
            ``place``, or ``block`` < 1.

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1, averaged over rows and heads; towers
    without a class token rank tokens by it (VisionZip, arXiv 2412.04467, official code for SigLIP).
    """
    if q_rows.dim() != 4:
        raise ValueError(f"q_rows has shape {tuple(q_rows.shape)}; it should be [B, H, R, d]")
    _groups(q_rows, k)
    batch, _, rows, width = q_rows.shape
    length = k.shape[2]
    if block < 1:
        raise ValueError(f"block is {block}; it should be at least 1")
    if place is None:
        if rows > length:
            raise ValueError(f"{rows} query rows with {length} keys; give place, their own keys")
        place = torch.arange(length - rows, length, device=k.device).expand(batch, -1)
    elif place.dtype != torch.long or place.shape != (batch, rows):
        raise ValueError(
            f"place is {place.dtype} {tuple(place.shape)}; it should be torch.int64 "
            f"{(batch, rows)}, the own key of each row"
        )
    if key_valid is not None:
        check_mask("key_valid", key_valid, (batch, length))
    if row_valid is not None:
        check_mask("row_valid", row_valid, (batch, rows))
    scale = width**-0.5 if scaling is None else scaling
    masks = [mask for mask in (key_valid, row_valid) if mask is not None]
    if q_rows.dtype == k.dtype and available(q_rows, k, place, *masks):
        from tokprune.operators.kernels.received import received_sums

        sums = received_sums(
            q_rows, k, scale, place, causal=causal, others_only=others_only,
            key_valid=key_valid, row_valid=row_valid, softcap=softcap,
        )  # fmt: skip
        total = sums.mean(1)
    else:
        total = torch.zeros(batch, length, device=k.device)
        arange = torch.arange(length, device=k.device)
        for start in range(0, rows, block):
            part = slice(start, start + block)
            own = place[:, part, None]
            allowed = None if key_valid is None else key_valid[:, None]
            if causal:
                before = arange <= own
                allowed = before if allowed is None else before & allowed
            got = attention_rows(q_rows[:, :, part], k, scale, allowed, softcap).mean(1)
            if others_only:
                got = got.masked_fill(arange == own, 0.0)
            if row_valid is not None:
                got = got.masked_fill(~row_valid[:, part, None], 0.0)
            total = total + got.sum(1)
    if row_valid is None:
        return total / max(1, rows - int(others_only))
    return total / (row_valid.sum(1, keepdim=True) - int(others_only)).clamp(min=1)


def _groups(q_rows: Tensor, k: Tensor) -> int:
    """Query heads per key head."""
    *lead, heads, _, width = q_rows.shape
    if list(k.shape[:-3]) != lead or k.shape[-1] != width:
        raise ValueError(
            f"k has shape {tuple(k.shape)}; with q_rows {tuple(q_rows.shape)} it should be "
            f"{(*lead, 'Hkv', 'L', width)}"
        )
    groups, over = divmod(heads, max(1, k.shape[-3]))
    if groups < 1 or over:
        raise ValueError(
            f"{heads} query heads with {k.shape[-3]} key heads; heads should be a multiple of the "
            "number of key heads"
        )
    return groups
