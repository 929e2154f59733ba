"""What changed since the frame before: the temporal baseline of serving engines."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from tokprune.operators.topk import keep_topk

__all__ = ["evs", "evs_count", "temporal_change"]


def evs_count(keep: int | float, frames: int, tokens_per_frame: int) -> int:
    """Tokens of a video that stay: the budget, but never less than the first frame.

    Args:
        keep: a count, or a fraction of all tokens, rounded down (1 − the pruning rate).
        frames, tokens_per_frame: of the video, at least 1 each.

    Returns:
        A count from ``tokens_per_frame`` to ``frames · tokens_per_frame``.

    Raises:
        ValueError: an argument is out of range.

    Source: Bagrov et al. 2025, arXiv 2510.14624, as in vLLM (its threshold becomes a fixed count).
    """
    if frames < 1 or tokens_per_frame < 1:
        raise ValueError(
            f"frames={frames} and tokens_per_frame={tokens_per_frame} should be at least 1"
        )
    if not keep > 0 or (isinstance(keep, float) and keep > 1):
        raise ValueError(f"keep={keep} should be a count of at least 1 or a fraction in (0, 1]")
    total = frames * tokens_per_frame
    wanted = keep if isinstance(keep, int) else int(total * keep)
    return max(tokens_per_frame, min(wanted, total))


@torch.no_grad()
def temporal_change(x: Tensor) -> Tensor:
    """Cosine distance of every token to the token at the same place one frame earlier.

    Args:
        x: [*, T, n, d] token features of any float dtype, frames in order.

    Returns:
        [*, T, n] float32, 1 − cos in [0, 2], exactly 0 where a token stayed what it was; infinite
        in the first frame. A zero vector differs from another one by 0, from all else by ½.

    Raises:
        ValueError: ``x`` has fewer than three dimensions.

    Source: Bagrov et al. 2025, arXiv 2510.14624.
    """
    if x.dim() < 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it should be [*, T, n, d]")
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    # half the squared difference of unit vectors is 1 − cos, without the rounding around 1
    moved = unit[..., 1:, :, :] - unit[..., :-1, :, :]
    change = torch.linalg.vecdot(moved, moved) / 2
    return torch.cat([torch.full_like(unit[..., :1, :, 0], torch.inf), change], dim=-2)


@torch.no_grad()
def evs(x: Tensor, k: int) -> Tensor:
    """The k tokens of a video that changed most, its first frame whole.

    Every token is compared with the frame before it, whether or not that one stays.

    Args:
        x: [*, T, n, d] token features of any float dtype, frames in order.
        k: tokens to keep, n ≤ k ≤ T·n (see :func:`evs_count`).

    Returns:
        [*, k] long, ascending indices frame · n + place; of equal changes the earlier token stays.

    Raises:
        ValueError: ``x`` has fewer than three dimensions, or ``k`` is out of range.

    Source: Bagrov et al. 2025, arXiv 2510.14624.
    """
    change = temporal_change(x)
    frames, n = change.shape[-2:]
    if not n <= k <= frames * n:
        raise ValueError(
            f"k is {k}; it should be between {n}, the first frame, and {frames * n}, the video"
        )
    return keep_topk(rearrange(change, "... t n -> ... (t n)"), k)
