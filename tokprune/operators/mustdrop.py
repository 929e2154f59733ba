"""Protected key tokens, the dual-attention filter and the cache it leaves behind (MustDrop)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokprune.operators.topk import rank


def key_scores(cls_row: Tensor) -> Tensor:
    """Attention that the class token pays to each other token, head mean.

    Args:
        cls_row: [..., H, 1+M] softmax row of the class token, itself in column 0.

    Returns:
        [..., M] float32.

    Raises:
        ValueError: ``cls_row`` has fewer than two dimensions or no column.

    Source: MustDrop, arXiv 2411.10803, key tokens.
    """
    if cls_row.dim() < 2 or cls_row.shape[-1] < 1:
        raise ValueError(f"cls_row has shape {tuple(cls_row.shape)}; it should be [..., H, 1+M]")
    return cls_row[..., 1:].mean(-2, dtype=torch.float32)


def key_tokens(cls_row: Tensor, rate: float = 0.08, valid: Tensor | None = None) -> Tensor:
    """The ⌈rate · M⌉ tokens the class token looks at most, by falling attention.

    Args:
        cls_row: [B, H, 1+M] softmax row of the class token, itself in column 0.
        rate: share of the tokens, in (0, 1].
        valid: [B, M] bool, real tokens; None means all. M then counts each sample's real tokens.

    Returns:
        LongTensor [B, k] with k = ⌈rate · M⌉, the class token not counted; of equal scores the
        lower position first; −1 after the keys of samples with fewer.

    Raises:
        ValueError: shapes do not match, ``rate`` outside (0, 1].

    Source: MustDrop, arXiv 2411.10803, key tokens.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}; it should be in (0, 1]")
    if cls_row.dim() != 3:
        raise ValueError(f"cls_row has shape {tuple(cls_row.shape)}; it should be [B, H, 1+M]")
    score = key_scores(cls_row)
    tokens = score.shape[-1]
    k = math.ceil(rate * tokens)
    if valid is None:
        return rank(score)[:, :k]
    _check_mask("valid", valid, score.shape)
    index = rank(score.masked_fill(~valid, -torch.inf))[:, :k]
    wanted = torch.tensor([math.ceil(rate * m) for m in range(tokens + 1)])
    wanted = wanted.to(score.device, non_blocking=True)
    beyond = torch.arange(k, device=score.device) >= wanted[valid.sum(-1)][:, None]
    return index.masked_fill(beyond, -1)


def key_mask(index: Tensor, n: int) -> Tensor:
    """Mark key tokens by position.

    Args:
        index: [..., k] long, positions in any order; negative ones are ignored.
        n: number of tokens.

    Returns:
        [..., n] bool.
    """
    mask = torch.zeros(*index.shape[:-1], n + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(-1, index.masked_fill(index < 0, n), True)[..., :n]


def text_attention(
    attn: Tensor, row_valid: Tensor | None = None, col_valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Total and greatest attention that each image token gets from the text rows, head mean.

    Args:
        attn: [..., H, R, n] probabilities, normalised over all keys of the sequence: rows of the
            text after the image, image columns. R = 0 is allowed.
        row_valid: [..., R] bool, rows that count; None means all.
        col_valid: [..., n] bool, real image tokens; None means all.

    Returns:
        (sum over rows [..., n], maximum over rows [..., n]), float32; 0 without a row and at
        columns that are not valid.

    Raises:
        ValueError: shapes do not match.

    Source: MustDrop, arXiv 2411.10803, dual-attention filtering.
    """
    if attn.dim() < 3:
        raise ValueError(f"attn has shape {tuple(attn.shape)}; it should be [..., H, R, n]")
    mean = attn.mean(-3, dtype=torch.float32)
    if row_valid is not None:
        _check_mask("row_valid", row_valid, mean.shape[:-1])
        mean = mean.masked_fill(~row_valid[..., None], 0.0)
    if col_valid is not None:
        _check_mask("col_valid", col_valid, (*mean.shape[:-2], mean.shape[-1]))
        mean = mean.masked_fill(~col_valid[..., None, :], 0.0)
    total = mean.sum(-2)
    return total, mean.amax(-2) if mean.shape[-2] else torch.zeros_like(total)


def filter_score(total: Tensor, peak: Tensor, gamma: float = 1.0, alpha: float = 0.0) -> Tensor:
    """One number per token that is at least 1 exactly where the dual filter keeps it.

    q = max(g/(γ·Σg), m/α); a limit of 0 keeps everything (q = ∞). The top K of q is a form of the
    filter with a fixed count (ours, not published).

    Args:
        total: [..., n] g, from ``text_attention``, of one image.
        peak: [..., n] m, from ``text_attention``.
        gamma: γ ≥ 0, share of the total that a token needs.
        alpha: α ≥ 0, probability that a token needs in one row.

    Returns:
        [..., n] float32.

    Raises:
        ValueError: ``gamma`` or ``alpha`` negative, shapes differ.

    Source: thresholds of MustDrop, arXiv 2411.10803; the score is ours.
    """
    if gamma < 0 or alpha < 0:
        raise ValueError(f"gamma is {gamma} and alpha is {alpha}; both should be at least 0")
    if total.shape != peak.shape:
        raise ValueError(f"peak has shape {tuple(peak.shape)}; it should be {tuple(total.shape)}")
    total, peak = total.float(), peak.float()
    limit = gamma * total.sum(-1, keepdim=True)
    by_share = (total / limit).masked_fill(limit == 0, torch.inf)
    if alpha == 0:
        return torch.full_like(by_share, torch.inf)
    # Divided by a tensor: a number would become a multiplication by its rounded inverse.
    return torch.maximum(by_share, peak / torch.full_like(peak, alpha))


def dual_filter(
    attn: Tensor,
    keys: Tensor | None = None,
    gamma: float = 1.0,
    alpha: float = 0.0,
    row_valid: Tensor | None = None,
    col_valid: Tensor | None = None,
) -> Tensor:
    """Drop tokens weak for the text both in total and for every single row; key tokens stay.

    Token j goes where g_j < γ·Σg and m_j < α, both strict. The defaults keep everything; so does
    an image without text rows.

    Args:
        attn: [H, R, n] or [B, H, R, n], as in ``text_attention``.
        keys: [n] or [B, n] bool, protected tokens (see ``key_mask``); None means none.
        gamma, alpha: thresholds, see ``filter_score``.
        row_valid: [R] or [B, R] bool, rows that count.
        col_valid: [n] or [B, n] bool, real image tokens; the others are not kept.

    Returns:
        [n] or [B, n] bool, tokens that stay. Their number is not known to the host: counting them
        is the caller's one synchronisation.

    Raises:
        ValueError: shapes do not match, thresholds negative.

    Source: MustDrop, arXiv 2411.10803, dual-attention filtering.
    """
    total, peak = text_attention(attn, row_valid, col_valid)
    keep = filter_score(total, peak, gamma, alpha) >= 1
    if keys is not None:
        _check_mask("keys", keys, keep.shape)
        keep = keep | keys
    return keep if col_valid is None else keep & col_valid


def cache_policy(
    keeps: Sequence[Tensor],
    start: int,
    image_len: int,
    text_len: int,
    layers: int,
    pruning_layers: Sequence[int] = (2, 6, 10, 14),
) -> list[Tensor | None]:
    """Which prefill cache entries of each layer stay: the tokens alive after the last cut.

    Args:
        keeps: per cut, [n_i] long, ascending image tokens kept, relative to the image block that
            enters the cut.
        start: position of the first image token.
        image_len: image tokens that enter the first cut.
        text_len: tokens after the image block.
        layers: number of decoder layers.
        pruning_layers: layers whose output is cut, ascending, one per entry of ``keeps``.

    Returns:
        Per layer, LongTensor of the entries that stay, in order; None where the cache stays as it
        is (layers before the first cut, and after the last one).

    Raises:
        ValueError: ``keeps`` and ``pruning_layers`` differ in number, or ``pruning_layers`` is not
            ascending inside 0…layers−1.

    Source: MustDrop, arXiv 2411.10803, output-aware cache policy.
    """
    if len(keeps) != len(pruning_layers):
        raise ValueError(
            f"keeps has {len(keeps)} entries; it should have {len(pruning_layers)}, one per "
            "pruning layer"
        )
    cuts = list(pruning_layers)
    if cuts != sorted(set(cuts)) or (cuts and not (cuts[0] >= 0 and cuts[-1] < layers)):
        raise ValueError(
            f"pruning_layers is {cuts}; it should be ascending and inside 0…{layers - 1}"
        )
    if not keeps:
        return [None] * layers
    device = keeps[0].device
    head = torch.arange(start, device=device)
    entering = [image_len, *(len(keep) for keep in keeps)]
    steps = []
    for n, keep in zip(entering, keeps):
        tail = torch.arange(start + n, start + n + text_len, device=device)
        steps.append(torch.cat([head, start + keep, tail]))
    whole = steps[-1]
    index: list[Tensor | None] = [None] * layers
    for i in range(len(cuts) - 1, -1, -1):
        if i < len(cuts) - 1:
            whole = steps[i][whole]
        first = cuts[i - 1] + 1 if i else cuts[0]
        for layer in range(first, cuts[i] + 1):
            index[layer] = whole
    return index


def _check_mask(name: str, mask: Tensor, shape: Sequence[int]) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"{name} is {mask.dtype} {tuple(mask.shape)}; it should be torch.bool {tuple(shape)}"
        )
