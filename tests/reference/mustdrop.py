"""MustDrop's key tokens, dual filter and cache policy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference.attention import full_map


def key_tokens(q: Tensor, k: Tensor, rate: float) -> Tensor:
    row = full_map(q, k)[:, :, 0, 1:].mean(1)
    return row.topk(math.ceil(rate * row.shape[1]), dim=-1).indices


def dual_filter(attention: Tensor, gamma: float, alpha: float) -> Tensor:
    """[n] bool: tokens that stay, of the attention [H, R, n] from the text to the image."""
    mean = attention.float().mean(0)
    total, peak = mean.sum(0), mean.amax(0)
    return ~((total < gamma * total.sum()) & (peak < alpha))


def filter_score(total: Tensor, peak: Tensor, gamma: float, alpha: float) -> Tensor:
    return torch.maximum(total / total.sum() / gamma, peak / alpha)


def cache_policy(
    keeps: list[Tensor], start: int, n: int, text: int, layers: int, cuts: list[int]
) -> list[Tensor | None]:
    """Per layer the prefill cache entries that stay, those of the tokens alive after the last cut;
    None where the cache stays as it is.

    ``keeps``: of each cut the image tokens kept, relative to the image block that enters it;
    ``start``: place of the block; ``n``: its first length; ``cuts``: layers whose output is cut.
    """
    steps, alive = [], n
    for keep in keeps:
        head = list(range(start))
        tail = list(range(start + alive, start + alive + text))
        steps.append(head + [start + int(j) for j in keep] + tail)
        alive = len(keep)
    result: list[Tensor | None] = []
    for layer in range(layers):
        later = [i for i, cut in enumerate(cuts) if layer <= cut]
        if not later or layer < cuts[0]:
            result.append(None)
            continue
        whole = steps[-1]
        for i in reversed(later[:-1]):
            whole = [steps[i][j] for j in whole]
        result.append(torch.tensor(whole))
    return result
