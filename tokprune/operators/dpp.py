"""Greedy MAP of a determinantal point process: relevant tokens that do not repeat each other."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.checks import check_points, check_selection, check_square
from tokprune.operators.diversity import DENSE_LIMIT, GRAM_LIMIT, Row, row_getter
from tokprune.operators.kernels import LONGEST_ROW, available

__all__ = ["conditional_kernel", "dpp_map", "dpp_map_from_kernel"]

_TINY = torch.finfo(torch.float32).tiny


def conditional_kernel(x: Tensor, relevance: Tensor | None = None) -> Tensor:
    """K_ij = r_i · cos(x_i, x_j) · r_j.

    Args:
        x: [*, n, d] token features of any float dtype; a zero row has cosine 0 with everything.
        relevance: [*, n], at least 0; None means 1 (the plain process of similarities).

    Returns:
        [*, n, n] float32.

    Raises:
        ValueError: ``relevance`` does not match ``x``.

    Source: CDPruner, arXiv 2506.10967, conditional DPP kernel.
    """
    _check(x, relevance)
    unit = normalize(x.float(), dim=-1)
    kernel = torch.matmul(unit, unit.transpose(-1, -2))
    # exactly 1 (0 for a zero row): without relevance, rounding would choose the first token
    kernel.diagonal(0, -2, -1).round_()
    if relevance is None:
        return kernel
    r = relevance.float()
    return r[..., None] * kernel * r[..., None, :]


@torch.no_grad()
def dpp_map(
    x: Tensor, k: int, relevance: Tensor | None = None, candidates: Tensor | None = None
) -> Tensor:
    """Greedy MAP inference of the process with kernel :func:`conditional_kernel`: each step adds
    the token that multiplies the determinant of the chosen submatrix most.

    Prefixes nest: the first j entries are the result for k = j. No host synchronisation. Once the
    kernel's rank is used up all remaining gains are rounding noise, and any tokens follow, none
    twice.

    Args:
        x: [*, n, d] token features of any float dtype; the arithmetic is float32.
        k: tokens to choose, 1 ≤ k ≤ n. Rows with fewer than k candidates give repeated indices.
        relevance: [*, n], at least 0; None means 1.
        candidates: [*, n] bool, tokens that may be chosen; None means all.

    Returns:
        LongTensor [*, k], selection order; of equal gains the lower index (so without relevance
        the first candidate leads).

    Raises:
        ValueError: ``k`` out of range, or shapes or dtypes do not match.

    Source: CDPruner, arXiv 2506.10967, with the incremental Cholesky of Chen et al., "Fast Greedy
    MAP Inference for Determinantal Point Process", NeurIPS 2018.
    """
    _check(x, relevance)
    check_selection(x.shape[:-1], k, candidates)
    by_kernel = available(x) if relevance is None else available(x, relevance)
    if x.shape[-2] <= (GRAM_LIMIT if by_kernel else DENSE_LIMIT):
        return dpp_map_from_kernel(conditional_kernel(x, relevance), k, candidates)
    rows = rearrange(normalize(x.float(), dim=-1), "... n d -> (...) n d")
    gain = rows.square().sum(-1).round()
    if relevance is not None:
        r = relevance.float().reshape(gain.shape)
        rows, gain = rows * r[..., None], r * gain * r
    if by_kernel:
        from tokprune.operators.kernels.steps import dpp_steps

        return dpp_steps(rows, gain, k, candidates).reshape(*x.shape[:-2], k)
    features = row_getter(rows)

    def row(index: Tensor) -> Tensor:
        return torch.bmm(rows, features(index)[..., None])[..., 0]

    return _greedy(row, gain, k, candidates).reshape(*x.shape[:-2], k)


@torch.no_grad()
def dpp_map_from_kernel(kernel: Tensor, k: int, candidates: Tensor | None = None) -> Tensor:
    """:func:`dpp_map` on a ready kernel.

    Args:
        kernel: [*, n, n] symmetric, positive semidefinite, of any float dtype.
        k: tokens to choose, 1 ≤ k ≤ n.
        candidates: [*, n] bool, tokens that may be chosen; None means all.

    Returns:
        LongTensor [*, k], selection order; of equal gains the lower index.

    Raises:
        ValueError: ``k`` out of range, ``kernel`` not square, or shapes do not match.

    Source: Chen et al., NeurIPS 2018, Algorithm 1.
    """
    check_square("kernel", kernel)
    check_selection(kernel.shape[:-1], k, candidates)
    matrix = rearrange(kernel.float(), "... n m -> (...) n m")
    if matrix.shape[-1] <= LONGEST_ROW and available(matrix):
        from tokprune.operators.kernels.dpp import dpp_picks

        order = dpp_picks(matrix.contiguous(), k, candidates)
        return order.reshape(*kernel.shape[:-2], k)
    diagonal = matrix.diagonal(0, -2, -1).clone()
    order = _greedy(row_getter(matrix), diagonal, k, candidates)
    return order.reshape(*kernel.shape[:-2], k)


def _greedy(row: Row, gain: Tensor, k: int, candidates: Tensor | None) -> Tensor:
    """k dependent steps, [B, k]. Overwrites ``gain`` [B, n], the kernel's diagonal.

    Step t appends row t of the Cholesky factor of the chosen tokens against all tokens, and takes
    its square off the gain that each token has left. A gain of 0 or below (a kernel of full rank
    has none) appends nothing that counts: the new row is 0.
    """
    batch, n = gain.shape
    if candidates is not None:
        gain.masked_fill_(~candidates.reshape(batch, n), -torch.inf)
    factor = gain.new_zeros(batch, k, n)
    order = []
    for t in range(k):
        left, at = gain.max(-1, keepdim=True)
        order.append(at)
        if t == k - 1:
            break
        new = row(at[:, 0])
        if t:
            chosen = factor[:, :t].gather(2, at[:, None].expand(-1, t, 1)).transpose(1, 2)
            new = torch.baddbmm(new[:, None], chosen, factor[:, :t], alpha=-1)[:, 0]
        scale = torch.where(left > _TINY, left, torch.inf).rsqrt()
        torch.mul(new, scale, out=factor[:, t])
        gain.addcmul_(factor[:, t], factor[:, t], value=-1)
        gain.scatter_(1, at, -torch.inf)
    return torch.cat(order, 1)


def _check(x: Tensor, relevance: Tensor | None) -> None:
    check_points(x)
    if relevance is not None and relevance.shape != x.shape[:-1]:
        raise ValueError(
            f"relevance has shape {tuple(relevance.shape)}; it should be {tuple(x.shape[:-1])}, "
            "one number per token"
        )
