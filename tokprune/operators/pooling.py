"""Trivial reducers of a grid: average pooling and evenly spaced positions."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from tokprune.operators.checks import checked_grid

__all__ = ["exact_scales", "grid_avg_pool", "grid_sample", "nested_scales", "share"]


def exact_scales(height: int, width: int) -> list[int]:
    """Token counts that square windows without remainder can give, largest first.

    Args:
        height, width: the grid, both at least 1.

    Returns:
        (height/p)·(width/p) for every common divisor p, e.g. 576, 144, 64, 36, 16, 9, 4, 1 for
        24×24.

    Raises:
        ValueError: a side is not positive.
    """
    common = _common(height, width)
    return [height * width // (p * p) for p in range(1, common + 1) if common % p == 0]


def nested_scales(height: int, width: int) -> list[int]:
    """A chain of exact scales, each a pooling of the one before: 576, 144, 36, 9, 1 for 24×24.

    Args:
        height, width: the grid, both at least 1.

    Returns:
        Token counts, largest first; every step pools by the smallest prime possible.

    Raises:
        ValueError: a side is not positive.

    Source: Matryoshka Multimodal Models, arXiv 2405.17430, section 3; the rule for other grids is
    ours.
    """
    left = _common(height, width)
    scales = [height * width]
    while left > 1:
        step = next(p for p in range(2, left + 1) if left % p == 0)
        left //= step
        scales.append(scales[-1] // (step * step))
    return scales


def grid_avg_pool(
    x: Tensor,
    scale: int | None = None,
    window: int | None = None,
    grid: tuple[int, int] | None = None,
    official_rounding: bool = False,
) -> Tensor:
    """Average over p×p windows that do not overlap.

    Args:
        x: [N, H·W, C] in raster order, any float dtype; means are taken in float32.
        scale: tokens wanted, (H/p)·(W/p) for a whole p. Give ``scale`` or ``window``.
        window: p, a divisor of both sides.
        grid: (H, W); None means a square.
        official_rounding: take p = ⌊√(H·W/scale)⌋ whatever count that gives, and leave out rows
            and columns that do not fill a window.

    Returns:
        [N, ⌊H/p⌋·⌊W/p⌋, C] in the dtype of ``x``, raster order.

    Raises:
        ValueError: ``scale`` or ``window`` does not fit the grid, both or neither is given, ``x``
            is not [N, H·W, C].

    Source: Matryoshka Multimodal Models, arXiv 2405.17430, section 3.
    """
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it should be [N, H·W, C]")
    height, width = checked_grid(grid, x.shape[1])
    p = _window(height, width, scale, window, official_rounding)
    if p == 1:
        return x
    rows, columns = height // p, width // p
    image = rearrange(x, "n (h w) c -> n h w c", h=height)[:, : rows * p, : columns * p]
    tiles = rearrange(image, "n (y p) (x q) c -> n y p x q c", p=p, q=p)
    # one axis after the other: a mean over both at once is many times slower on this view
    sums = tiles.sum(2, dtype=torch.float32).sum(3)
    return rearrange((sums / (p * p)).to(x.dtype), "n y x c -> n (y x) c")


def grid_sample(
    height: int, width: int, keep: int, device: torch.device | str | None = None
) -> Tensor:
    """Exactly ``keep`` positions spread evenly over a grid.

    R = round(√(keep·height/width)) rows at ⌊(2i+1)·height/(2R)⌋; row i gets
    ⌊(i+1)·keep/R⌋ − ⌊i·keep/R⌋ = c positions at columns ⌊(2j+1)·width/(2c)⌋. R is raised or
    lowered as far as keep ≤ R·width and R ≤ min(height, keep) ask for. With
    keep = (height/p)·(width/p) these are the centres (⌊p/2⌋, ⌊p/2⌋) of all p×p windows.

    Args:
        height, width: the grid, both at least 1.
        keep: number of positions, 0 ≤ keep ≤ height·width.
        device: of the result.

    Returns:
        LongTensor [keep], ascending, distinct.

    Raises:
        ValueError: a side is not positive, or ``keep`` out of range.

    Source: spatial sampling baseline of Matryoshka Multimodal Models, arXiv 2405.17430; the
    published text gives no offsets, this definition is ours.
    """
    _common(height, width)
    _check_keep(keep, height * width)
    if keep == 0:
        return torch.empty(0, dtype=torch.long, device=device)
    rows = round(math.sqrt(keep * height / width))
    rows = min(max(rows, -(-keep // width), 1), height, keep)
    positions = []
    for i in range(rows):
        y = (2 * i + 1) * height // (2 * rows)
        count = (i + 1) * keep // rows - i * keep // rows
        positions += [y * width + (2 * j + 1) * width // (2 * count) for j in range(count)]
    return torch.tensor(positions).to(device, non_blocking=True)


def share(total: int, sizes: list[int]) -> list[int]:
    """Divide a budget between parts in proportion to their sizes, exactly.

    Every part gets the floor of its share; what is left goes one each to the largest remainders,
    of equal ones to the earlier part.

    Args:
        total: the budget, 0 ≤ total ≤ sum of the sizes.
        sizes: size of each part, at least 0.

    Returns:
        A number per part, at most its size, that add up to ``total``.

    Raises:
        ValueError: ``total`` out of range.
    """
    whole = sum(sizes)
    _check_keep(total, whole)
    shares = [total * size // max(1, whole) for size in sizes]
    rest = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % max(1, whole)))
    for i in rest[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _window(
    height: int, width: int, scale: int | None, window: int | None, official_rounding: bool
) -> int:
    if (scale is None) == (window is None):
        raise ValueError(f"scale is {scale} and window is {window}; give exactly one of them")
    if window is not None:
        fits = 1 <= window <= min(height, width)
        if not fits or (not official_rounding and (height % window or width % window)):
            raise ValueError(
                f"window is {window}; it should divide both sides of the {height}×{width} grid"
            )
        return window
    assert scale is not None
    p = math.isqrt(height * width // scale) if scale > 0 else 0
    if official_rounding:
        if not 1 <= p <= min(height, width):
            raise ValueError(f"scale is {scale}; it should be in 1…{height * width}")
        return p
    scales = exact_scales(height, width)
    if scale not in scales:
        raise ValueError(
            f"scale is {scale}; a {height}×{width} grid can be pooled to {scales} tokens"
        )
    return p


def _check_keep(keep: int, n: int) -> None:
    if not 0 <= keep <= n:
        raise ValueError(f"keep is {keep}; it should be between 0 and {n}")


def _common(height: int, width: int) -> int:
    if height < 1 or width < 1:
        raise ValueError(f"grid is {height}×{width}; both sides should be positive")
    return math.gcd(height, width)
