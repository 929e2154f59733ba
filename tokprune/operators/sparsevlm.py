"""Text raters, their scores of image tokens, and recycling of dropped tokens (SparseVLM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.operators.attention import masked_softmax
from tokprune.operators.checks import check_mask
from tokprune.operators.rows import take_rows
from tokprune.operators.topk import rank

__all__ = [
    "Recycled", "attention_rank", "best_heads", "fixed_count", "rank_count", "rater_attention",
    "recycle_counts", "recycle_merge", "rotary_weight", "text_raters", "text_relevance",
    "vision_scores",
]  # fmt: skip

#: image tokens whose similarity to the text is held at once
_CHUNK = 512

# ------------------------------------------------------------------------------- raters


def text_relevance(
    embeds: Tensor, image: Tensor, text: Tensor, text_valid: Tensor | None = None
) -> Tensor:
    """How much each text token is what the image tokens are similar to.

    Raw dot products with every text token, softmax over the text, mean over the image tokens.

    Args:
        embeds: [B, L, D] embedded prompt, any float dtype.
        image: [B, L] bool, image tokens.
        text: [B, R] long, places of the text tokens.
        text_valid: [B, R] bool, entries of ``text`` that count; None means all.

    Returns:
        [B, R] float32; sums to 1 over a sample's text tokens; 0 in samples without image or text.

    Raises:
        ValueError: shapes do not match.

    Source: SparseVLM, arXiv 2410.04417, relevant text token selection.
    """
    if embeds.dim() != 3 or image.shape != embeds.shape[:2]:
        raise ValueError(
            f"image has shape {tuple(image.shape)} and embeds {tuple(embeds.shape)}; they should "
            "be [B, L] and [B, L, D]"
        )
    if text_valid is None:
        text_valid = torch.ones_like(text, dtype=torch.bool)
    check_mask("text_valid", text_valid, text.shape)
    words = take_rows(embeds, text).float()
    total = words.new_zeros(text.shape)
    hidden = ~text_valid[:, None]
    for part, real in zip(embeds.split(_CHUNK, 1), image.split(_CHUNK, 1)):
        share = masked_softmax(part.float() @ words.mT, hidden)
        total = total + share.masked_fill(~real[:, :, None], 0.0).sum(1)
    return total / image.sum(1, keepdim=True).clamp(min=1)


def text_raters(relevance: Tensor, valid: Tensor | None = None) -> Tensor:
    """Text tokens of more than average relevance; all of them where none is above the average.

    Args:
        relevance: [..., R] from ``text_relevance``.
        valid: [..., R] bool, text tokens that count; None means all.

    Returns:
        [..., R] bool.

    Raises:
        ValueError: ``valid`` does not match.

    Source: SparseVLM, arXiv 2410.04417, official code (the paper takes ≥, which differs for ties
    alone). All of them: ours, the official code fails there (a single text token).
    """
    if valid is None:
        valid = torch.ones_like(relevance, dtype=torch.bool)
    check_mask("valid", valid, relevance.shape)
    mean = relevance.masked_fill(~valid, 0.0).sum(-1, keepdim=True)
    mean = mean / valid.sum(-1, keepdim=True).clamp(min=1)
    above = (relevance > mean) & valid
    return torch.where(above.any(-1, keepdim=True), above, valid)


# ------------------------------------------------------------------------------- scores


def rotary_weight(cos: Tensor, sin: Tensor, rows: Tensor, least: float | None = 1e-3) -> Tensor:
    """What rotary position embedding alone makes of attention logits, at each distance.

    W_pq = (R_p 1)·(R_q 1)/√d = (2/√d) Σ_i cos((p − q) θ_i), with the all-ones head vector 1.

    Args:
        cos, sin: [B, L, d] rotary embedding of each position, both halves alike.
        rows: [B, R] long, places of the queries.
        least: lower bound, as a share of W at distance 0: the sum falls to 0 and below for long
            distances or narrow heads, where dividing by it makes no sense; None: no bound, as in
            the official code.

    Returns:
        [B, R, L] float32, positive where there is a bound.

    Source: SparseVLM+, arXiv 2410.04417 (later version), official code; the bound is ours.
    """
    half = cos.shape[-1] // 2
    wave = torch.cat([cos[..., :half], sin[..., :half]], dim=-1).float()
    weight = take_rows(wave, rows) @ wave.mT
    if least is not None:
        top = wave.square().sum(-1).amax(1)[:, None, None]
        weight = torch.maximum(weight, least * top)
    return weight * (2 * (2 * half) ** -0.5)


def rater_attention(probs: Tensor, raters: Tensor, weight: Tensor | None = None) -> Tensor:
    """Attention that each head's raters pay to each key, summed over the raters.

    Args:
        probs: [B, H, R, L] softmax rows.
        raters: [B, R] bool, rows that count.
        weight: [B, R, L] what to divide the rows by, see ``rotary_weight``; None means 1.

    Returns:
        [B, H, L] float32.

    Raises:
        ValueError: shapes do not match.

    Source: SparseVLM, arXiv 2410.04417.
    """
    check_mask("raters", raters, (probs.shape[0], probs.shape[2]))
    factor = raters[:, :, None].float()
    if weight is not None:
        if weight.shape != (probs.shape[0], *probs.shape[2:]):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; it should be "
                f"{(probs.shape[0], *probs.shape[2:])}"
            )
        factor = factor / weight
    return (probs.float() * factor[:, None]).sum(2)


def best_heads(total: Tensor, image: Tensor, heads: int) -> Tensor:
    """Heads whose raters attend to the image most, by falling sum.

    Args:
        total: [B, H, L] from ``rater_attention``.
        image: [B, L] bool, image tokens.
        heads: heads wanted, ≥ 1; capped at H.

    Returns:
        LongTensor [B, min(heads, H)]; of equal sums the lower head first.

    Raises:
        ValueError: ``heads`` below 1, or shapes do not match.

    Source: SparseVLM+, official code (there 14).
    """
    if heads < 1:
        raise ValueError(f"heads is {heads}; it should be at least 1")
    check_mask("image", image, (total.shape[0], total.shape[2]))
    return rank(total.masked_fill(~image[:, None], 0.0).sum(-1))[:, :heads]


def vision_scores(total: Tensor, raters: Tensor, heads: Tensor | None = None) -> Tensor:
    """Mean over heads and raters of the attention to each key.

    Args:
        total: [B, H, L] from ``rater_attention``.
        raters: [B, R] bool, the raters summed there.
        heads: [B, h] long, heads to average over; None means all.

    Returns:
        [B, L] float32; 0 in samples without raters.

    Source: SparseVLM, arXiv 2410.04417.
    """
    if heads is not None:
        total = take_rows(total, heads)
    return total.mean(1) / raters.sum(1, keepdim=True).clamp(min=1)


def attention_rank(probs: Tensor, raters: Tensor, image: Tensor) -> Tensor:
    """Rank of the raters × image block of the head-mean attention.

    Args:
        probs: [B, H, R, L] softmax rows; or their head mean with H = 1.
        raters: [B, R] bool.
        image: [B, L] bool.

    Returns:
        LongTensor [B]; singular values up to max(raters, image tokens) · 2⁻²³ of the largest count
        as 0, as in torch.linalg.matrix_rank of the bare block.

    Raises:
        ValueError: shapes do not match.

    Source: SparseVLM, arXiv 2410.04417, adaptive sparsification by rank.
    """
    check_mask("raters", raters, (probs.shape[0], probs.shape[2]))
    check_mask("image", image, (probs.shape[0], probs.shape[3]))
    block = probs.float().mean(1).masked_fill(~(raters[:, :, None] & image[:, None]), 0.0)
    size = torch.maximum(raters.sum(1), image.sum(1)).float()
    return torch.linalg.matrix_rank(
        block, atol=torch.zeros_like(size), rtol=size * torch.finfo(torch.float32).eps
    )


def rank_count(
    rank: int, tokens: int, scale: float = 13.5, bias: float = 0.0, always_drop: bool = False
) -> int:
    """Image tokens to keep, from the rank of the raters' attention.

    All of them at full rank (rank = tokens), else int(rank · scale + bias), at least 1.

    Args:
        rank: from ``attention_rank``.
        tokens: image tokens there are, ≥ 1.
        scale, bias: official first release 13.5 and 0, its video branch 1 and 0.
        always_drop: below full rank at least one token goes (official).

    Returns:
        A count in [1, tokens]; 0 of 0.

    Source: SparseVLM, arXiv 2410.04417, first official release.
    """
    if rank >= tokens:
        return tokens
    return max(1, fixed_count(int(rank * scale + bias), tokens, always_drop))


def fixed_count(keep: int, tokens: int, always_drop: bool = False) -> int:
    """``keep`` capped at the tokens there are; ``always_drop``: at one less (official)."""
    return min(keep, tokens - 1 if always_drop else tokens)


# ------------------------------------------------------------------------------- recycling


def recycle_counts(dropped: int, fraction: float = 0.3, cluster_size: int = 10) -> tuple[int, int]:
    """How many dropped tokens are recycled, and into how many merged ones.

    Args:
        dropped: tokens dropped, ≥ 0.
        fraction: share of them that is recycled, in [0, 1]; 0 recycles nothing.
        cluster_size: about how many make one merged token, ≥ 1.

    Returns:
        (μ, k): int(fraction · dropped) + 1 tokens, at most ``dropped``, and int(μ / cluster_size)
        + 1 clusters, at most μ; (0, 0) where nothing is dropped or recycled.

    Source: SparseVLM, arXiv 2410.04417, token recycling; numbers of the official code.
    """
    if dropped < 1 or fraction == 0:
        return 0, 0
    chosen = min(int(fraction * dropped) + 1, dropped)
    return chosen, min(chosen // cluster_size + 1, chosen)


@dataclass(frozen=True)
class Recycled:
    """Clusters of dropped tokens."""

    #: [N, C, D] merged tokens, in the dtype of the input, 0 where there is none
    out: Tensor
    #: [N, C] long: the token at the centre of each cluster, −1 where there is none
    centre: Tensor
    #: [N, M] long: cluster of each token, −1 for padding
    cluster: Tensor


def recycle_merge(
    x: Tensor, most: int, clusters: Tensor | None = None, valid: Tensor | None = None
) -> Recycled:
    """Cluster vectors by density peaks and replace each cluster by its mean.

    Distances are Euclidean over √D. A token's density falls with the mean squared distance to its
    k nearest (itself among them), k the number of clusters; its separation is the distance to the
    nearest token of higher density (the largest distance of all if there is none). The tokens of
    highest density × separation are the centres; the others join the nearest centre.

    Densities are compared as logarithms: exp(−d²) would underflow for long vectors. Ties go to the
    lower index; the official code breaks them by random noise.

    Args:
        x: [N, M, D] vectors, any float dtype.
        most: C, largest number of clusters of a sample, 1 ≤ C ≤ M.
        clusters: [N] long, number of clusters of each sample, ≤ C and ≤ its tokens; None means C.
        valid: [N, M] bool, real tokens, before all padding; None means all.

    Returns:
        A :class:`Recycled`; clusters in order of falling score of their centres.

    Raises:
        ValueError: ``most`` out of range, or shapes do not match.

    Source: SparseVLM, arXiv 2410.04417, token recycling, official code; Rodriguez and Laio 2014
    (density peaks).
    """
    if x.dim() != 3 or not 1 <= most <= x.shape[1]:
        raise ValueError(f"most is {most} and x has shape {tuple(x.shape)}; 1 ≤ most ≤ M")
    n, m = x.shape[:2]
    if valid is None:
        valid = torch.ones(n, m, dtype=torch.bool, device=x.device)
    check_mask("valid", valid, (n, m))
    if clusters is None:
        clusters = torch.full((n,), most, device=x.device)
    vectors = x.float().masked_fill(~valid[:, :, None], 0.0)
    distance = _distances(vectors, valid)
    score = _peaks(distance, clusters, most, valid)
    exists = torch.arange(most, device=x.device) < clusters[:, None]
    centre = rank(score)[:, :most]
    to_centre = take_rows(distance, centre)
    cluster = to_centre.masked_fill(~exists[:, :, None], torch.inf).argmin(1)
    # A centre is its own cluster's, even where another centre is a copy of it.
    number = torch.arange(most, device=x.device).expand(n, most)
    spare = torch.cat([cluster, cluster[:, :1]], dim=1)
    spare = spare.scatter(1, centre.masked_fill(~exists, m), number)
    cluster = spare[:, :m].masked_fill(~valid, -1)
    member = (cluster[:, None] == number[:, :, None]).float()
    out = member @ vectors / member.sum(-1, keepdim=True).clamp(min=1)
    return Recycled(out.to(x.dtype), centre.masked_fill(~exists, -1), cluster)


def _distances(x: Tensor, valid: Tensor) -> Tensor:
    """Euclidean distances over √D, [N, M, M]; 0 on the diagonal."""
    # Around their mean, where the products of the expansion cancel least.
    mean = x.sum(1, keepdim=True) / valid.sum(1)[:, None, None].clamp(min=1)
    x = (x - mean).masked_fill(~valid[:, :, None], 0.0)
    norm, product = x.square().sum(-1), x @ x.mT
    # exactly symmetric, so that nearest neighbours of each other tie in density whatever the kernel
    squared = norm[:, :, None] + norm[:, None] - (product + product.mT)
    eye = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return squared.clamp(min=0).masked_fill(eye, 0.0).sqrt() * x.shape[2] ** -0.5


def _peaks(distance: Tensor, clusters: Tensor, most: int, valid: Tensor) -> Tensor:
    """Logarithm of density × separation, [N, M]; −∞ where padded or not separated."""
    pairs = valid[:, :, None] & valid[:, None]
    near = distance.masked_fill(~valid[:, None], torch.inf).topk(most, dim=-1, largest=False)
    counted = torch.arange(most, device=distance.device) < clusters[:, None]
    squared = near.values.square().masked_fill(~counted[:, None], 0.0)
    density = -squared.sum(-1) / clusters[:, None].clamp(min=1)
    higher = (density[:, None] > density[:, :, None]) & pairs
    apart = distance.masked_fill(~higher, torch.inf).amin(-1)
    widest = distance.masked_fill(~pairs, 0.0).flatten(1).amax(1, keepdim=True)
    apart = torch.where(apart == torch.inf, widest, apart)
    return (density + apart.log()).masked_fill(~valid, -torch.inf)
