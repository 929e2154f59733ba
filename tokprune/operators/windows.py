"""Merge the windows of a grid whose tokens resemble each other (MustDrop, first stage)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from tokprune.operators.checks import check_choice, checked_grid
from tokprune.operators.rows import largest_together, take_rows
from tokprune.operators.topk import rank

__all__ = ["WindowMerge", "spatial_merge", "spatial_merge_fixed", "window_similarity"]

Share = Literal["batch"]


@dataclass(frozen=True, eq=False)
class WindowMerge:
    """Result of a window merge. Rows: class token (if any), merged windows, untouched tokens.

    M is the largest number of rows without the class token, r the largest number of merged
    windows, c = 1 with a class token and 0 without.
    """

    #: [B, c+M, D] in the dtype of the input; padding rows are 0
    out: Tensor
    #: [B, c+M] bool, real rows
    valid: Tensor
    #: [B, c+M, 1] float32, grid tokens in each row (class token 1, padding 0)
    size: Tensor
    #: [B] long, merged windows
    r: Tensor
    #: real rows of ``out`` per sample, class token included, on the host
    counts: list[int]
    #: [B, r] long, grid index of the last (bottom-right) token of each merged window, by falling
    #: similarity, which is output order; −1 where a sample merges fewer
    dst: Tensor
    #: [B, U] long, ascending grid indices of the untouched tokens, −1 as padding
    unmerged: Tensor
    #: [B, N] long, row (class token not counted) that holds each grid token
    group: Tensor
    #: [B, M] long, grid index that stands for each row: ``dst``, then ``unmerged``; −1 as padding
    rows: Tensor
    #: [B, W] float32, mean pairwise cosine of each window, in raster order
    similarity: Tensor


def window_similarity(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Mean cosine similarity of all ordered pairs of different tokens inside each window.

    (‖Σû‖² − Σ‖û‖²)/(ab(ab − 1)) with û the tokens at length one: no pairs are formed.

    Args:
        x: [B, h·w, D] grid tokens in raster order, any float dtype; float32 inside.
        window: (a, b) rows and columns of a window, at least two tokens.
        grid: (h, w), multiples of (a, b).

    Returns:
        [B, h·w/(a·b)] float32, windows in raster order.

    Raises:
        ValueError: grid and window do not fit ``x`` or each other.

    Source: MustDrop, arXiv 2411.10803, local spatial merging.
    """
    area = _area(window, checked_grid(grid, x.shape[1]))
    unit = x.float()
    unit = unit / torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp(min=1e-8)
    own = _tiled(unit.square().sum(-1, keepdim=True), window, grid).sum((2, 4, 5))
    # one axis after the other: a sum over both at once is many times slower on this view
    total = _tiled(unit, window, grid).sum(2).sum(3).square().sum(-1) - own
    return rearrange(total, "b y x -> b (y x)") / (area * (area - 1))


def spatial_merge(
    x: Tensor,
    threshold: float = 0.8,
    window: tuple[int, int] = (3, 3),
    class_token: bool = True,
    share: Share | Tensor = "batch",
    grid: tuple[int, int] | None = None,
) -> WindowMerge:
    """Replace the r most uniform windows of each sample by their mean.

    r is the number of windows whose similarity reaches ``threshold``, the least one among the
    samples that share it.

    Args:
        x: [B, c+N, D] tokens, class token first (c = 1) if there is one; any float dtype.
        threshold: least mean pairwise cosine of a window.
        window: (a, b) rows and columns.
        class_token: x[:, 0] is no grid token; it passes unchanged.
        share: "batch" for one r for all samples (official code), or [B] long: samples with the
            same number share r (tiles of one image).
        grid: (h, w), multiples of (a, b); None means a square.

    Returns:
        A ``WindowMerge``, padded where samples merge different numbers of windows.

    Raises:
        ValueError: shapes, window and grid do not match; unknown ``share``.

    Synchronises with the host once (r).

    Source: MustDrop, arXiv 2411.10803, local spatial merging, official code.
    """
    cls, grid, area = _prepare(x, window, class_token, grid)
    similarity = window_similarity(x[:, cls:], window, grid)
    own = (similarity >= threshold).sum(-1)
    image = share if isinstance(share, Tensor) else None
    if image is None:
        check_choice("share", share, Share)
    r = -largest_together(-own, image, "share")  # the least, that is
    return _merge(x, similarity, r, r.tolist(), window, grid, cls, area)


def spatial_merge_fixed(
    x: Tensor,
    window: tuple[int, int],
    retained: int,
    class_token: bool = True,
    grid: tuple[int, int] | None = None,
) -> WindowMerge:
    """Merge the number of windows that brings each sample down to a token count.

    r = (T − retained) // (ab − 1) of the T tokens, class token included.

    Args:
        x: [B, c+N, D] tokens, class token first (c = 1) if there is one.
        window: (a, b) rows and columns.
        retained: tokens wanted; the result has N − r(ab − 1) of them (and the class token), more
            where the window does not divide evenly.
        class_token: x[:, 0] is no grid token.
        grid: (h, w), multiples of (a, b); None means a square.

    Returns:
        A ``WindowMerge`` without padding; no synchronisation with the host.

    Raises:
        ValueError: ``retained`` is more than T or needs more windows than there are; shapes,
            window and grid do not match.

    Source: fixed-count variant of MustDrop, arXiv 2411.10803, as LightCompress has it.
    """
    cls, grid, area = _prepare(x, window, class_token, grid)
    similarity = window_similarity(x[:, cls:], window, grid)
    batch, windows = similarity.shape
    count = (x.shape[1] - retained) // (area - 1)
    if not 0 <= count <= windows:
        least = x.shape[1] - (windows + 1) * (area - 1) + 1
        raise ValueError(
            f"retained is {retained}; with {x.shape[1]} tokens and windows of {window} it should "
            f"be between {least} and {x.shape[1]}"
        )
    r = torch.full((batch,), count, device=x.device)
    return _merge(x, similarity, r, [count] * batch, window, grid, cls, area)


def _merge(
    x: Tensor,
    similarity: Tensor,
    r: Tensor,
    r_host: list[int],
    window: tuple[int, int],
    grid: tuple[int, int],
    cls: int,
    area: int,
) -> WindowMerge:
    """Merge the ``r`` windows of highest similarity of each sample."""
    batch, tokens, device = x.shape[0], x.shape[1] - cls, x.device
    most, least = max(r_host, default=0), min(r_host, default=0)
    rows = tokens - least * (area - 1)
    order = rank(similarity)
    place = order.argsort(-1)  # rank of each window
    number = torch.arange(tokens, device=device)
    y, xx = number // grid[1], number % grid[1]
    window_of = y // window[0] * (grid[1] // window[1]) + xx // window[1]
    last = (y % window[0] == window[0] - 1) & (xx % window[1] == window[1] - 1)

    joined = place[:, window_of]
    merged = joined < r[:, None]
    group = torch.where(merged, joined, r[:, None] + (~merged).cumsum(-1) - 1)
    stands = torch.where(merged & ~last, rows, group)  # column ``rows`` is thrown away
    table = torch.full((batch, rows + 1), -1, device=device)
    table = table.scatter(1, stands, number.expand(batch, -1))[:, :rows]

    slot = torch.arange(rows, device=device)
    real = slot < (tokens - r * (area - 1))[:, None]
    size = torch.where(slot < r[:, None], float(area), 1.0).masked_fill(~real, 0.0)

    patches = x[:, cls:]
    out = take_rows(patches, table.clamp(min=0))
    if most:
        sums = _tiled(patches, window, grid).sum(2, dtype=torch.float32).sum(3)
        means = rearrange(sums / area, "b y x d -> b (y x) d")
        chosen = take_rows(means, order[:, :most]).to(x.dtype)
        own = slot[:most] < r[:, None]
        out[:, :most] = torch.where(own[..., None], chosen, out[:, :most])
    if most != least:
        out = out.masked_fill(~real[..., None], 0.0)

    beyond = torch.arange(most, device=device) >= r[:, None]
    dst = table[:, :most].masked_fill(beyond, -1)
    free = tokens - least * area
    column = torch.arange(free, device=device) + r[:, None]
    untouched = table.gather(1, column.clamp(max=rows - 1))  # beyond a sample's rows: −1
    if cls:
        lead = torch.ones_like(size[:, :1])
        out = torch.cat([x[:, :1], out], dim=1)
        size, real = torch.cat([lead, size], dim=1), torch.cat([lead.bool(), real], dim=1)
    return WindowMerge(
        out=out,
        valid=real,
        size=size[..., None],
        r=r,
        counts=[cls + tokens - count * (area - 1) for count in r_host],
        dst=dst,
        unmerged=untouched,
        group=group,
        rows=table,
        similarity=similarity,
    )


def _prepare(
    x: Tensor, window: tuple[int, int], class_token: bool, grid: tuple[int, int] | None
) -> tuple[int, tuple[int, int], int]:
    """Class tokens, grid and tokens per window, checked."""
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it should be [B, tokens, D]")
    cls = int(class_token)
    grid = checked_grid(grid, x.shape[1] - cls)
    return cls, grid, _area(window, grid)


def _area(window: tuple[int, int], grid: tuple[int, int]) -> int:
    """Tokens of a window, which is checked."""
    area = window[0] * window[1]
    if min(window) < 1 or area < 2 or grid[0] % window[0] or grid[1] % window[1]:
        raise ValueError(
            f"window is {window}; it should hold at least two tokens and divide the grid {grid}"
        )
    return area


def _tiled(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """[B, h·w, D] as [B, h/a, a, w/b, b, D]."""
    return rearrange(
        x, "n (y a x b) d -> n y a x b d", a=window[0], b=window[1], x=grid[1] // window[1]
    )
