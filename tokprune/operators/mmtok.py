"""Greedy coverage of a question's words and of the image at once (MMTok)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.checks import check_mask, check_number, check_points
from tokprune.operators.diversity import DENSE_LIMIT

__all__ = ["multimodal_coverage", "square_padding"]

#: rows of the similarities whose gains are summed at once
_CHUNK = 1024


@torch.no_grad()
def multimodal_coverage(
    text: Tensor, vision: Tensor, features: Tensor, k: int, alpha: float = 0.5,
    text_temperature: float = 0.02, image_temperature: float = 0.2,
    words: Tensor | None = None, excluded: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Visual tokens that together cover the words of a text and all visual tokens.

    Every word spreads a mass of 1/m over the n visual tokens, by the softmax of its cosines to
    them; every visual token spreads α/n, by its cosines in another space. What a set covers of a
    row is the largest share that one of its tokens has of it; a step adds the token that raises
    the sum over all rows most. Prefixes nest: the first j entries are the result for k = j. No
    host synchronisation; above 8192 tokens the similarities are made anew in every step.

    Args:
        text: [B, m, d] words, of any float dtype; the arithmetic is float32. m may be 0.
        vision: [B, n, d] visual tokens in the same space.
        features: [B, n, c] the same tokens in the space in which they cover each other.
        k: tokens to choose, 1 ≤ k ≤ n.
        alpha: α, at least 0.
        text_temperature, image_temperature: what the cosines are divided by, above 0.
        words: [B, m] bool, real words (others are padding); None: all.
        excluded: [B, n] bool, tokens that are never chosen, and want to be covered all the same.

    Returns:
        LongTensor [B, k], selection order; of equal gains the lower index; −1 where all tokens
        that are not excluded have been chosen (the official code then repeats token 0).

    Raises:
        ValueError: ``k`` or a number out of range, or shapes do not match.

    Source: MMTok, arXiv 2508.18264. Masks, batches and chunks are ours.
    """
    check_points(vision)
    batch, n = vision.shape[:2]
    check_number("k", k, n)
    if text.shape[::2] != vision.shape[::2] or features.shape[:2] != vision.shape[:2]:
        raise ValueError(
            f"text has shape {tuple(text.shape)}, vision {tuple(vision.shape)} and features "
            f"{tuple(features.shape)}; they should be [B, m, d], [B, n, d] and [B, n, c]"
        )
    if not (alpha >= 0 and text_temperature > 0 and image_temperature > 0):
        raise ValueError(
            f"alpha is {alpha}, text_temperature {text_temperature} and image_temperature "
            f"{image_temperature}; alpha should be at least 0, and temperatures above 0"
        )
    real = torch.ones(text.shape[:2], dtype=torch.bool, device=vision.device)
    if words is not None:
        check_mask("words", words, text.shape[:2])
        real = words
    closed = torch.zeros(batch, n, dtype=torch.bool, device=vision.device)
    if excluded is not None:
        check_mask("excluded", excluded, closed.shape)
        closed = excluded
    unit, own = _unit(vision), _unit(features)
    mass = real.float() / real.sum(-1, keepdim=True).clamp(min=1)
    cosine = torch.bmm(_unit(text), unit.transpose(1, 2))
    of_words = (cosine / float(text_temperature)).softmax(-1) * mass[..., None]

    def of_tokens(part: slice) -> Tensor:
        cosine = torch.bmm(own[:, part], own.transpose(1, 2))
        return (cosine / float(image_temperature)).softmax(-1).mul_(alpha / n)

    parts = [slice(start, start + _CHUNK) for start in range(0, n, _CHUNK)]
    held = [of_tokens(part) for part in parts] if n <= DENSE_LIMIT else None
    covered = [torch.zeros_like(of_words[..., 0])]
    covered += [torch.zeros_like(own[:, part, 0]) for part in parts]
    order: list[Tensor] = []
    while True:
        gain = torch.zeros(batch, n, device=unit.device)
        for i in range(1 + len(parts)):
            rows = of_words
            if i:
                rows = of_tokens(parts[i - 1]) if held is None else held[i - 1]
            if order:
                at = order[-1].clamp(min=0)[:, None].expand(-1, rows.shape[1], 1)
                covered[i] = torch.maximum(covered[i], rows.gather(2, at)[..., 0])
            gain += (rows - covered[i][..., None]).clamp_(min=0).sum(1)
        best = gain.masked_fill_(closed, -torch.inf).max(-1, keepdim=True)
        order.append(torch.where(best.values == -torch.inf, -1, best.indices))
        if len(order) == k:
            return torch.cat(order, 1)
        closed = closed.scatter(1, best.indices, True)


def _unit(x: Tensor) -> Tensor:
    return normalize(x.float(), dim=-1, eps=1e-8)


def square_padding(height: int, width: int, side: int = 336, patch: int = 14) -> Tensor:
    """Patches that show nothing but padding, where an image is padded to a square, in the middle.

    Args:
        height, width: of the image in pixels.
        side: pixels along the edge of the square after resizing, a multiple of ``patch``.
        patch: pixels along the edge of a patch.

    Returns:
        LongTensor [p] (CPU), patch numbers in raster order, row after row of a wide image, column
        after column of a tall one.

    Raises:
        ValueError: a size is below 1, or ``side`` no multiple of ``patch``.

    Source: MMTok, arXiv 2508.18264, its code for LLaVA-1.5.
    """
    if min(height, width, side, patch) < 1 or side % patch:
        raise ValueError(
            f"height is {height}, width {width}, side {side} and patch {patch}; all should be at "
            "least 1, and side a multiple of patch"
        )
    short = round(min(height, width) * side / max(height, width))
    before = (side - short) // 2
    lines = side // patch
    behind = (side - short - before) // patch
    padded = [*range(before // patch), *range(lines - behind, lines)]
    line, along = torch.tensor(padded, dtype=torch.long)[:, None], torch.arange(lines)
    number = line * lines + along if width >= height else along * lines + line
    return number.flatten()
