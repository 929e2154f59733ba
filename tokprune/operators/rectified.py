"""Rectified attention: fewer keys speak as loudly as all of them did, wherever they stand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Extended", "distance_bias", "extended", "recycled_weight"]

#: channels of a head are a multiple of this, which flash kernels ask for
_MULTIPLE = 8


class Extended(NamedTuple):
    """Queries, keys and values whose plain attention is a biased one; the output's channels beyond
    those of the values are 0."""

    query: Tensor
    key: Tensor
    value: Tensor


def extended(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Extended:
    """Fold a bias of the keys into extra channels, so that any attention kernel applies it.

    A query gets channels of 1, a key ``bias / scaling``: the product is the bias. In half
    precision the number is split into two channels, so that it loses nothing: of a head of 128,
    log 4 / scaling is 15.7, whose neighbours in bfloat16 are 0.06 apart. Zeros fill up to a
    multiple of 8 channels.

    Args:
        query: [B, H, Lq, d] of any float dtype, rotary applied.
        key: [B, Hkv, Lk, d].
        value: [B, Hkv, Lk, dv].
        bias: [B, Lk], added to every logit of a key after scaling; finite.
        scaling: factor of the logits, which stays as it is: 1/√d of the channels given here.

    Returns:
        The same with 2 to 9 channels more, in their dtypes.

    Raises:
        ValueError: ``bias`` is not [B, Lk].

    Source: ERA, "Entropy-Guided Visual Token Pruning with Rectified Attention", arXiv 2606.31982,
    figure 2c–d, for one channel; the second is ours.
    """
    if bias.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; it should be [{key.shape[0]}, {key.shape[2]}], "
            "a number per key"
        )
    exact = bias.float() / scaling
    high = exact.to(key.dtype)
    low = (exact - high.float()).to(key.dtype)
    both = torch.stack([high, low], -1)[:, None].expand(-1, key.shape[1], -1, -1)
    more = -(key.shape[-1] + 2) % _MULTIPLE
    ones = query.new_ones(*query.shape[:-1], 2)
    return Extended(
        torch.cat([query, ones, query.new_zeros(*query.shape[:-1], more)], -1),
        torch.cat([key, both, key.new_zeros(*key.shape[:-1], more)], -1),
        torch.cat([value, value.new_zeros(*value.shape[:-1], 2 + more)], -1),
    )


def distance_bias(
    query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor], c: float = 2.0
) -> Tensor:
    """What rotary positions take from an attention logit with distance, given back: log(c − D).

    D is the mean cosine of the angle between the rotated channels of query and key, 1 at distance
    0 and around 0 far away. With rotary tables of several axes (M-RoPE) it is the mean over all
    frequencies, each with the distance along its own axis.

    Args:
        query: cos and sin [*, q, f] of the queries' rotary angles, by frequency, each frequency
            equally often, any float dtype; the arithmetic is float32. A factor of both, as tables
            of some models have it, plays no part.
        key: the same [*, k, f] of the keys.
        c: above 1. With 2, a key at the query's own position gets 0.

    Returns:
        [*, q, k] float32, from log(c − 1) to log(c + 1).

    Raises:
        ValueError: ``c`` is not above 1.

    Source: RESTORE, arXiv 2606.01711, section 3.3 and appendix A (M-RoPE).
    """
    if not c > 1:
        raise ValueError(f"c={c} should be above 1: the term is log(c − D), and D reaches 1")
    angles = [torch.cat([cos.float(), sin.float()], -1) for cos, sin in (query, key)]
    # cos² + sin² is the square of the tables' factor, by frequency
    unit = [own / own.square().sum(-1, keepdim=True).sqrt() for own in angles]
    return (c - unit[0] @ unit[1].transpose(-1, -2)).log()


def recycled_weight(cluster: Tensor, anchors: Tensor, weight: Tensor | None = None) -> Tensor:
    """How much a kept token stands for: 1, and the weights of those that joined it.

    Args:
        cluster: [*, n] long, the number of the anchor that each token belongs to
            (:func:`~tokprune.operators.anchors.nearest`), −1 for none.
        anchors: [*, k] long, the kept tokens.
        weight: [*, n] of every token; None: 1 each, which makes it the size of the cluster.

    Returns:
        [*, k] float32.

    Source: ERA, arXiv 2606.31982, figure 2b; its constant and the scale of the entropies behind
    its weights are not printed.
    """
    own = torch.ones_like(cluster, dtype=torch.float32) if weight is None else weight.float()
    own = own.scatter(-1, anchors, 1.0).masked_fill(cluster < 0, 0.0)
    total = own.new_zeros(anchors.shape)
    return total.scatter_add(-1, cluster.clamp(min=0), own)
