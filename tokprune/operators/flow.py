"""Information-flow scores inside a vision tower, and how many tokens each layer drops (FlowCut)."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.attention import attention_rows
from tokprune.operators.checks import check_choice, check_mask
from tokprune.operators.rows import largest_together
from tokprune.operators.topk import keep_topk, rank

__all__ = [
    "FlowKeep", "FlowTerms", "accumulate", "attention_entropy", "attn_terms", "encoder_keep",
    "flow_score", "global_query_terms", "prune_count", "text_terms",
]  # fmt: skip

Semantic = Literal["dot", "cosine"]
ValueNorm = Literal["mean", "per_head"]
Reduce = Literal["image", "batch"]


class FlowTerms(NamedTuple):
    """What a score is made of, float32, one entry per token that may be dropped."""

    #: [..., N] attention of the token that looks, not renormalised
    attention: Tensor
    #: [..., N] similarity of its value to theirs, not renormalised
    semantic: Tensor
    #: [..., N, d] (or [..., N, Hkv·d]) vectors whose L1 norm weighs the token
    value: Tensor


@dataclass(frozen=True, eq=False)
class FlowKeep:
    """The tokens that stay after one cut."""

    #: [B, n] long, ascending, padded with −1 at the end
    index: Tensor
    #: tokens kept per row
    counts: list[int]


def attn_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None = None,
    semantic: Semantic = "dot",
    value_norm: ValueNorm = "mean",
    allowed: Tensor | None = None,
) -> FlowTerms:
    """[CLS] attention, similarity of values to that of the class token, and values of all patches.

    Only that one row is computed, never the whole map. The class token stays inside both
    softmaxes and is dropped afterwards.

    Args:
        q: [..., H, 1+N, d] queries with bias, class token first; its own query alone
            ([..., H, 1, d]) is enough.
        k: [..., Hkv, 1+N, d] keys.
        v: [..., Hkv, 1+N, d] values.
        scaling: factor of the attention logits; None means 1/√d. Value products are not scaled.
        semantic: "dot" is the softmax of the value products (official code); "cosine" the head
            mean of the cosine similarities, negative ones as 0 (paper; the clipping is ours).
        value_norm: "mean" gives the head mean of the values, "per_head" all heads side by side.
        allowed: [..., 1+N] bool, real tokens; None means all. Others get 0 everywhere.

    Returns:
        (attention [..., N], semantic [..., N], value [..., N, d] or [..., N, Hkv·d]), float32.

    Raises:
        ValueError: shapes do not match, or an unknown ``semantic`` or ``value_norm``.

    Source: FlowCut, arXiv 2505.19536, official code.
    """
    terms = _row_terms(
        q[..., :1, :], k, v[..., :1, :], v, scaling, 1.0, semantic, value_norm, allowed
    )
    return FlowTerms(terms.attention[..., 1:], terms.semantic[..., 1:], terms.value[..., 1:, :])


def text_terms(
    q_row: Tensor,
    k: Tensor,
    v_row: Tensor,
    v: Tensor,
    scaling: float | None = None,
    semantic: Semantic = "dot",
    value_norm: ValueNorm = "mean",
    allowed: Tensor | None = None,
) -> FlowTerms:
    """Terms of one text token that looks at visual tokens alone (the cut inside the decoder).

    Both softmaxes run over the allowed keys only, both with ``scaling``.

    Args:
        q_row: [..., H, 1, d] query of that token, rotary applied.
        k: [..., Hkv, L, d] keys, rotary applied.
        v_row: [..., Hkv, 1, d] value of that token.
        v: [..., Hkv, L, d] values.
        scaling: factor of both logits; None means 1/√d.
        semantic, value_norm: as in ``attn_terms``.
        allowed: [..., L] bool, the visual tokens; None means all L.

    Returns:
        (attention [..., L], semantic [..., L], value [..., L, d]), float32; 0 where not allowed.

    Raises:
        ValueError: as ``attn_terms``.

    Source: FlowCut, arXiv 2505.19536, official code of the decoder stage.
    """
    return _row_terms(q_row, k, v_row, v, scaling, scaling, semantic, value_norm, allowed)


def global_query_terms(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None = None, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the mean query and head-mean values: towers without a class token.

    The score is ``flow_score(attention, None, value, renormalize=False)``.

    Args:
        q: [..., H, N, d] queries, vision rotary applied.
        k: [..., Hkv, N, d] keys, vision rotary applied.
        v: [..., Hkv, N, d] values.
        scaling: factor of the logits; None means 1/√d.
        allowed: [..., N] bool, real patches; None means all.

    Returns:
        attention [..., N] and value [..., N, d], float32; 0 where not allowed.

    Raises:
        ValueError: shapes do not match.

    Source: FlowCut, arXiv 2505.19536, official code for Qwen2-VL.
    """
    if allowed is None:
        mean_query = q.float().mean(-2, keepdim=True)
    else:
        outside = ~allowed[..., None, :, None]
        total = q.float().masked_fill(outside, 0.0).sum(-2, keepdim=True)
        mean_query = total / allowed.sum(-1).clamp(min=1)[..., None, None, None]
    rows = None if allowed is None else allowed[..., None, :]
    attention = attention_rows(mean_query, k, scaling, rows).mean(-3).squeeze(-2)
    return attention, _values(v, "mean", allowed)


def flow_score(
    attention: Tensor, semantic: Tensor | None, value: Tensor, renormalize: bool = True
) -> Tensor:
    """Score of each token: (attention share + semantic share) · ‖value‖₁.

    Args:
        attention: [..., N] ≥ 0, tokens alive (0 for padding), any float dtype.
        semantic: [..., N] ≥ 0, or None to leave the term out.
        value: [..., N, d].
        renormalize: divide both rows by their sums over N; False takes them as they are. A row
            whose sum is 0 (underflow) counts as 0.

    Returns:
        [..., N] float32, at least 0.

    Raises:
        ValueError: shapes do not match.

    Source: FlowCut, arXiv 2505.19536, official code.
    """
    if value.shape[:-1] != attention.shape:
        raise ValueError(
            f"value has shape {tuple(value.shape)}; it should be {(*attention.shape, 'd')}"
        )
    if semantic is not None and semantic.shape != attention.shape:
        raise ValueError(
            f"semantic has shape {tuple(semantic.shape)}; it should be {tuple(attention.shape)}"
        )
    row = _share(attention) if renormalize else attention.float()
    if semantic is not None:
        row = row + (_share(semantic) if renormalize else semantic.float())
    return row * value.float().abs().sum(-1)


def accumulate(previous: Tensor | None, score: Tensor, history: float = 0.5) -> Tensor:
    """Moving average of scores over layers.

    Args:
        previous: [..., N] average so far, gathered to the tokens alive; None at the first layer.
        score: [..., N] of this layer.
        history: weight of ``previous``.

    Returns:
        [..., N] float32.

    Raises:
        ValueError: shapes do not match, or ``history`` outside [0, 1].

    Source: FlowCut, arXiv 2505.19536, cumulative importance.
    """
    if not 0 <= history <= 1:
        raise ValueError(f"history is {history}; it should be between 0 and 1")
    if previous is None:
        return score.float()
    if previous.shape != score.shape:
        raise ValueError(
            f"previous has shape {tuple(previous.shape)}; it should be {tuple(score.shape)}, one "
            "entry per token alive"
        )
    return history * previous.float() + (1 - history) * score.float()


def attention_entropy(
    attention: Tensor, valid: Tensor | None = None, renormalize: bool = True, eps: float = 0.0
) -> Tensor:
    """Entropy of an attention row over the entropy of a uniform one: h = −Σ p ln(p + ε) / ln N.

    Args:
        attention: [..., N] ≥ 0.
        valid: [..., N] bool, real tokens; None means all. N counts these alone.
        renormalize: divide the row by its sum first.
        eps: ε; with 0 an entry of 0 adds nothing.

    Returns:
        [...] float32; 1 where a row has fewer than two tokens.

    Raises:
        ValueError: ``valid`` does not match ``attention``.

    Source: FlowCut, arXiv 2505.19536, adaptive pruning ratio.
    """
    p, alive = _masked(attention, valid)
    if renormalize:
        p = _share(p)
    if eps:
        entropy = -torch.special.xlogy(p, p + eps).sum(-1)
    else:
        entropy = torch.special.entr(p).sum(-1)
    if isinstance(alive, int):
        return entropy / log(alive) if alive > 1 else torch.ones_like(entropy)
    return torch.where(alive > 1, entropy / alive.clamp(min=2).float().log(), 1.0)


def prune_count(
    attention: Tensor,
    remaining: int,
    target: int | Tensor,
    valid: Tensor | None = None,
    reduce: Reduce | Tensor = "image",
    renormalize: bool = True,
    eps: float = 0.0,
) -> Tensor:
    """How many tokens to drop now: round((N − target)/√remaining · (1 − h²)), half to even.

    Towers without a class token use ``renormalize=False, eps=1e-7``.

    Args:
        attention: [B, N] attention over the tokens alive, any float dtype; float32 inside.
        remaining: layers left, at least 1.
        target: tokens wanted in the end, one number or [B] long.
        valid: [B, N] bool, real tokens; None means all.
        reduce: "image" counts for each row; "batch" gives every row the largest count (official);
            [B] long: rows with the same number share the largest among them (tiles of one image).
        renormalize, eps: see ``attention_entropy``.

    Returns:
        LongTensor [B] on the device of ``attention``, in 0 … max(0, N − target); no
        synchronisation.

    Raises:
        ValueError: ``attention`` not [B, N], ``remaining`` or ``target`` too small, ``valid`` does
            not match, unknown ``reduce``.

    Source: FlowCut, arXiv 2505.19536, adaptive pruning ratio.
    """
    if attention.dim() != 2:
        raise ValueError(f"attention has shape {tuple(attention.shape)}; it should be [B, N]")
    if remaining < 1:
        raise ValueError(f"remaining is {remaining}; it should be at least 1")
    if not isinstance(reduce, Tensor):
        check_choice("reduce", reduce, Reduce)
    _check_target(target)
    excess = _alive(attention, valid) - target
    excess = max(excess, 0) if isinstance(excess, int) else excess.clamp(min=0)
    h = attention_entropy(attention, valid, renormalize, eps)
    count = ((1 - h * h) * (excess / remaining**0.5)).round().long()
    if isinstance(reduce, Tensor) or reduce == "batch":
        count = largest_together(count, reduce if isinstance(reduce, Tensor) else None, "reduce")
    if isinstance(excess, int):
        return count.clamp(0, excess)
    return torch.minimum(count.clamp(min=0), excess)


def encoder_keep(
    accumulated: Tensor,
    attention: Tensor,
    remaining: int,
    target: int | Tensor,
    valid: Tensor | None = None,
    reduce: Reduce | Tensor = "image",
    period: int = 2,
    renormalize: bool = True,
    eps: float = 0.0,
) -> FlowKeep | None:
    """The tokens that stay after one encoder layer, or None where the layer cuts nothing.

    Layers whose ``remaining`` is a multiple of ``period`` cut: to ``target`` exactly when it is 0,
    otherwise by ``prune_count`` and never below ``target``. Tokens of highest ``accumulated``
    stay; of equal scores the lower position.

    Args:
        accumulated: [B, N] from ``accumulate``, tokens alive, class token not included.
        attention: [B, N] of this layer.
        remaining: layers left until the final cut (0 = this is the final one).
        target: tokens wanted in the end, at least 1, one number or [B] long.
        valid: [B, N] bool, real tokens; None means all.
        reduce, renormalize, eps: see ``prune_count``. With "batch" and equal lengths every row
            keeps the same number.
        period: layers between cuts.

    Returns:
        index [B, n] ascending, −1 after the tokens of shorter rows, and the counts; or None.

    Raises:
        ValueError: shapes do not match, ``remaining`` negative, ``period`` < 1, and those of
            ``prune_count``.

    Synchronises with the host once per cut (the counts); not at the final cut when ``valid`` is
    None and ``target`` a number.

    Source: FlowCut, arXiv 2505.19536, official code.
    """
    if accumulated.dim() != 2 or attention.shape != accumulated.shape:
        raise ValueError(
            f"attention has shape {tuple(attention.shape)} and accumulated "
            f"{tuple(accumulated.shape)}; both should be [B, N]"
        )
    if remaining < 0 or period < 1:
        raise ValueError(
            f"remaining is {remaining} and period is {period}; they should be at least 0 and 1"
        )
    _check_target(target)
    if remaining % period:
        return None
    batch, tokens = accumulated.shape
    if isinstance(target, int) and tokens <= target:
        return None
    if remaining == 0 and valid is None and isinstance(target, int):
        return FlowKeep(keep_topk(accumulated, target), [target] * batch)
    alive = _alive(attention, valid)
    if remaining == 0:
        dropped = (alive - target).clamp(min=0)  # one of both is a tensor here
    else:
        dropped = prune_count(attention, remaining, target, valid, reduce, renormalize, eps)
    if isinstance(alive, int):
        gone, lengths = dropped.tolist(), [alive] * batch
    else:
        gone, lengths = torch.stack([dropped, alive]).tolist()
    if not any(gone):
        return None
    counts = [length - less for length, less in zip(lengths, gone)]
    most = max(counts)
    score = accumulated if valid is None else accumulated.masked_fill(~valid, -torch.inf)
    if min(counts) == most:
        return FlowKeep(keep_topk(score, most), counts)
    index = rank(score)[:, :most]
    padding = torch.arange(most, device=index.device) >= (alive - dropped)[:, None]
    index = index.masked_fill(padding, tokens).sort(-1).values
    return FlowKeep(index.masked_fill(index == tokens, -1), counts)


def _row_terms(
    q_row: Tensor,
    k: Tensor,
    v_row: Tensor,
    v: Tensor,
    scaling: float | None,
    value_scaling: float | None,
    semantic: Semantic,
    value_norm: ValueNorm,
    allowed: Tensor | None,
) -> FlowTerms:
    check_choice("semantic", semantic, Semantic)
    check_choice("value_norm", value_norm, ValueNorm)
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v has shape {tuple(v.shape)}; it should be {(*k.shape[:-1], 'd')}")
    if allowed is not None:
        check_mask("allowed", allowed, (*k.shape[:-3], k.shape[-2]))
    rows = None if allowed is None else allowed[..., None, :]
    attention = attention_rows(q_row, k, scaling, rows).mean(-3).squeeze(-2)
    if semantic == "dot":
        similar = attention_rows(v_row, v, value_scaling, rows).mean(-3).squeeze(-2)
    else:
        cosine = normalize(v_row.float(), dim=-1) @ normalize(v.float(), dim=-1).mT
        similar = cosine.mean(-3).squeeze(-2).clamp(min=0)
        if allowed is not None:
            similar = similar.masked_fill(~allowed, 0.0)
    return FlowTerms(attention, similar, _values(v, value_norm, allowed))


def _values(v: Tensor, value_norm: ValueNorm, allowed: Tensor | None) -> Tensor:
    if value_norm == "mean":
        value = v.mean(-3, dtype=torch.float32)
    else:
        value = rearrange(v.float(), "... h n d -> ... n (h d)")
    return value if allowed is None else value.masked_fill(~allowed[..., None], 0.0)


def _masked(attention: Tensor, valid: Tensor | None) -> tuple[Tensor, int | Tensor]:
    """Attention in float32, 0 at padding, and the number of real tokens."""
    if valid is None:
        return attention.float(), attention.shape[-1]
    alive = _alive(attention, valid)
    return attention.float().masked_fill(~valid, 0.0), alive


def _alive(attention: Tensor, valid: Tensor | None) -> Any:
    """Number of real tokens: of every row, or of each, [...] long."""
    if valid is None:
        return attention.shape[-1]
    check_mask("valid", valid, attention.shape)
    return valid.sum(-1)


def _share(row: Tensor) -> Tensor:
    """Divided by its sum; a row of zeros stays as it is."""
    row = row.float()
    return row / row.sum(-1, keepdim=True).clamp(min=torch.finfo(row.dtype).tiny)


def _check_target(target: int | Tensor) -> None:
    if isinstance(target, int) and target < 1:
        raise ValueError(f"target is {target}; it should be at least 1")
