"""Keep what a small basis of tokens cannot reconstruct, and merge the rest into it (ApET)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.bipartite import best_match
from tokprune.operators.checks import check_choice, check_number
from tokprune.operators.rows import take_rows
from tokprune.operators.topk import rank

__all__ = ["Compressed", "WriteBack", "approximation_error", "compress", "farthest_points"]

#: "none": basis tokens stay where they are (ours). The official places of the basis in the output:
#: "door" and "qwen" (half of each) over the kept tokens of least error in prompt order, "layer"
#: over the same by falling error
WriteBack = Literal["none", "door", "layer", "qwen"]

#: tokens that look for the nearest one at once
_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Compressed:
    """Kept tokens in prompt order."""

    #: [B, T, D] in the dtype of the features
    out: Tensor
    #: [B, T] long, ascending
    index: Tensor
    #: [B, N] long: the row of ``out`` that holds each token
    group: Tensor
    #: [B, N] float32
    errors: Tensor
    #: [B, k] long, in sampling order
    basis: Tensor


def farthest_points(x: Tensor, k: int, start: Tensor | None = None) -> Tensor:
    """Start with one token, then always take that of the largest Euclidean distance to its nearest
    chosen one; none twice.

    Args:
        x: [B, N, D] of any float dtype; distances are float32.
        k: how many, 0 … N.
        start: [B] long, the first token; None: that of the largest norm (ours).

    Returns:
        LongTensor [B, k] in order of sampling; of equal distances the lower index.

    Raises:
        ValueError: ``k`` is negative or larger than N.

    Source: ApET, arXiv 2602.19870 (its first token is random).
    """
    if not 0 <= k <= x.shape[1]:
        raise ValueError(f"k is {k}; it should be between 0 and the {x.shape[1]} tokens")
    wide = x.float()
    newest = wide.norm(dim=-1).argmax(-1) if start is None else start
    nearest = torch.full(x.shape[:2], torch.inf, device=x.device)
    chosen = [newest]
    for _ in range(k - 1):
        points = take_rows(wide, newest[:, None])
        distance = torch.cdist(wide, points, compute_mode="donot_use_mm_for_euclid_dist")[..., 0]
        nearest = torch.minimum(nearest, distance).scatter(1, newest[:, None], -1.0)
        newest = nearest.argmax(-1)
        chosen.append(newest)
    return torch.stack(chosen, dim=1)[:, :k]


def approximation_error(x: Tensor, basis: Tensor, ridge: float = 1e-5) -> Tensor:
    """Euclidean distance of every token to its approximation by a linear combination of the basis.

    Args:
        x: [B, N, D] of any float dtype.
        basis: [B, k] long, which tokens are the basis.
        ridge: added to the squared norms of the basis, absolute.

    Returns:
        [B, N] float32. The equations of the weights are solved in float64 (float32 on devices
        without it): equal tokens in the basis leave the ridge alone to tell them apart.

    Source: ApET, arXiv 2602.19870.
    """
    wide = x.float()
    if not basis.shape[1]:
        return wide.norm(dim=-1)
    points = take_rows(wide, basis)
    exact = points.to(torch.float32 if x.device.type == "mps" else torch.float64)
    gram = exact @ exact.mT + float(ridge) * torch.eye(
        basis.shape[1], dtype=exact.dtype, device=exact.device
    )
    factor = torch.linalg.cholesky_ex(gram).L
    weights = torch.cholesky_solve((points @ wide.mT).to(exact.dtype), factor)
    return (wide - weights.mT.float() @ points).norm(dim=-1)


def compress(
    x: Tensor, keep: int, basis: int = 10, start: Tensor | None = None, ridge: float = 1e-5,
    write_back: WriteBack = "none",
) -> Compressed:  # fmt: skip
    """Keep ``basis`` tokens and those that they approximate worst, and merge every other token into
    the most similar of the latter, all with equal weight.

    Args:
        x: [B, N, D] features of any float dtype; the arithmetic is float32.
        keep: T, 1 … N.
        basis: k; at most T − 1 are taken, so that one token is left to merge into.
        start: see :func:`farthest_points`.
        ridge: see :func:`approximation_error`.
        write_back: "none", or where the official code writes the basis: the T tokens of largest
            error stay then, and the k smallest of them are overwritten.

    Returns:
        A ``Compressed``; all sizes are static, no synchronisation with the host.

    Raises:
        ValueError: ``keep`` outside 1 … N, ``basis`` negative, or ``write_back`` unknown.

    Source: ApET, arXiv 2602.19870, official code.
    """
    check_choice("write_back", write_back, WriteBack)
    batch, n, width = x.shape
    check_number("keep", keep, n)
    if basis < 0:
        raise ValueError(f"basis is {basis}; it should be at least 0")
    wide, heads = x.float(), keep - min(basis, keep - 1)
    points = farthest_points(wide, keep - heads, start)
    errors = approximation_error(wide, points, ridge)
    if write_back == "none":
        head, tail = rank(errors.scatter(1, points, -1.0))[:, :heads], points
        base = wide
    else:
        head, tail = rank(errors)[:, :keep].split([heads, keep - heads], dim=1)
        tail = tail if write_back == "layer" else tail.sort(-1).values
        new = take_rows(wide, points)
        if write_back == "qwen":
            new = 0.5 * new + 0.5 * take_rows(wide, tail)
        base = wide.scatter(1, tail[..., None].expand_as(new), new)

    stays = torch.zeros(batch, n, dtype=torch.int8, device=x.device)
    stays = stays.scatter(1, head, 1).scatter(1, tail, 1)
    others = stays.argsort(dim=1, stable=True)[:, : n - keep]
    unit = normalize(wide, dim=-1)
    slots = [best_match(unit, part, head)[1] for part in others.split(_CHUNK, dim=1)]
    slot = torch.cat(slots, dim=1)
    flat = (slot + torch.arange(batch, device=x.device)[:, None] * heads).flatten()
    total = take_rows(wide, head).flatten(0, 1)
    total = total.index_add(0, flat, take_rows(wide, others).flatten(0, 1))
    number = torch.ones(batch * heads, device=x.device)
    number = number.index_add(0, flat, torch.ones_like(flat, dtype=torch.float32))
    mean = (total / number[:, None]).view(batch, heads, width)
    base = base.scatter(1, head[..., None].expand_as(mean), mean)

    index = torch.cat([head, tail], dim=1).sort(-1).values
    row = torch.full_like(errors, -1, dtype=torch.long)
    row = row.scatter(1, index, torch.arange(keep, device=x.device).expand_as(index))
    group = row.scatter(1, others, row.gather(1, head).gather(1, slot))
    return Compressed(take_rows(base, index).to(x.dtype), index, group, errors, points)
