"""Greedy diversity selection: tokens that lie far from each other in cosine distance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.checks import check_points, check_selection, check_square
from tokprune.operators.kernels import LONGEST_ROW, available

__all__ = [
    "center_pivot", "cls_pivot", "cls_scores", "divprune", "farthest_pivot",
    "k_center", "k_center_from_distance", "max_sum", "random_pivot",
]  # fmt: skip

#: Row of pairwise values of the token last chosen in each set: [B] → [B, n].
Row = Callable[[Tensor], Tensor]

#: Up to this many tokens all pairwise similarities are held; above it one row is made per step.
DENSE_LIMIT = 8192

#: The same with kernels: one program reads the matrix row by row, which takes ever longer.
GRAM_LIMIT = 4096

#: Rows of pairwise similarities held at once when the whole matrix is not.
_CHUNK = 1024


@torch.no_grad()
def max_sum(x: Tensor, k: int, pivot: Tensor, candidates: Tensor | None = None) -> Tensor:
    """Greedy max-sum diversification: each step adds the token farthest from the set in sum.

    Prefixes nest: the first j entries are the result for k = j.

    Args:
        x: [*, n, d] token features of any float dtype; the arithmetic is float32.
        k: tokens to choose, 1 ≤ k ≤ n. Rows with fewer than k candidates give repeated indices.
        pivot: [*] long, index of the first token (see ``cls_pivot``, ``farthest_pivot``).
        candidates: [*, n] bool, tokens that may be chosen; None means all. Newline, padding and
            zero rows should be excluded.

    Returns:
        LongTensor [*, k], selection order, the pivot first; of equal tokens the lower index.

    Raises:
        ValueError: ``k`` out of range, or shapes or dtypes do not match.

    Source: ToDRE, arXiv 2505.18757v2, Algorithm 1.
    """
    batch = _start(x, k, candidates)
    _check_pivot(pivot, x.shape[:-2])
    if k > 1 and available(batch):
        return _by_kernel(batch, k, pivot, candidates, total=True)
    row = _rows(batch, finish=torch.Tensor.neg_) if k > 1 else None
    state = batch.new_zeros(batch.shape[:-1])
    return _greedy(row, state, k, pivot, candidates, torch.Tensor.add_)


@torch.no_grad()
def k_center(
    x: Tensor, k: int, pivot: Tensor, candidates: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Greedy k-center: each step adds the token farthest from its nearest chosen one.

    Prefixes nest: the first j entries are the result for k = j.

    Args:
        x: [*, n, d] token features of any float dtype; the arithmetic is float32.
        k: tokens to choose, 1 ≤ k ≤ n. Rows with fewer than k candidates give repeated indices.
        pivot: [*] long, index of the first token.
        candidates: [*, n] bool, tokens that may be chosen; None means all.
        weight: [*, n], at least 0: a token's distances are multiplied by it; None means 1.

    Returns:
        LongTensor [*, k], selection order, the pivot first; of equal tokens the lower index.

    Raises:
        ValueError: ``k`` out of range, or shapes or dtypes do not match.

    Source: Gonzalez 1985 (farthest-first traversal); ToDRE, arXiv 2505.18757v1.
    """
    batch = _start(x, k, candidates)
    _check_pivot(pivot, x.shape[:-2])
    weighted = _weighting(batch, weight)
    if k > 1 and available(batch) and (weighted is None or batch.shape[1] <= GRAM_LIMIT):
        return _by_kernel(batch, k, pivot, candidates, total=False, weighted=weighted)
    row = _rows(batch, finish=weighted or _to_distance) if k > 1 else None
    state = batch.new_full(batch.shape[:-1], torch.inf)
    return _greedy(row, state, k, pivot, candidates, _minimum_)


@torch.no_grad()
def divprune(
    x: Tensor, k: int, candidates: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Max–min diversity: the most isolated token first, then greedy k-center.

    Unlike the official code, chosen tokens are masked, so duplicates never repeat an index.

    Args:
        x: [*, n, d] token features of any float dtype; the arithmetic is float32.
        k: tokens to choose, 1 ≤ k ≤ n. Rows with fewer than k candidates give repeated indices.
        candidates: [*, n] bool, tokens that may be chosen and that count as neighbours; None means
            all.
        weight: [*, n], at least 0: of a token's distances once the first token stands; None: 1.

    Returns:
        LongTensor [*, k], selection order; of equal tokens the lower index.

    Raises:
        ValueError: ``k`` out of range, or shapes or dtypes do not match.

    Source: DivPrune, arXiv 2503.02175, Algorithm 1; ``weight``: arXiv 2608.30263v1.
    """
    batch = _start(x, k, candidates)
    allowed = None if candidates is None else candidates.reshape(batch.shape[:-1])
    if batch.shape[1] <= GRAM_LIMIT and available(batch) and weight is None:
        from tokprune.operators.kernels.greedy import greedy_picks, nearest_other

        gram = torch.bmm(batch, batch.transpose(1, 2))
        first = _argmax(nearest_other(gram, allowed), allowed)
        return greedy_picks(gram, k, first, allowed).reshape(*x.shape[:-2], k)
    if batch.shape[1] <= DENSE_LIMIT and not available(batch):
        matrix = _to_distance(torch.bmm(batch, batch.transpose(1, 2)))
        matrix.diagonal(0, -2, -1).fill_(torch.inf)
        others = matrix if allowed is None else matrix.masked_fill(~allowed[..., None], torch.inf)
        first = _argmax(others.amin(-2), allowed).reshape(x.shape[:-2])
        if weight is not None:
            matrix.mul_(_weights(matrix, weight))
        state = torch.full_like(matrix[:, 0], torch.inf)
        return _greedy(_matrix_rows(matrix), state, k, first, candidates, _minimum_)
    isolation = []
    for start in range(0, batch.shape[1], _CHUNK):
        part = _to_distance(torch.bmm(batch[:, start : start + _CHUNK], batch.transpose(1, 2)))
        part.diagonal(start, -2, -1).fill_(torch.inf)
        if allowed is not None:
            part.masked_fill_(~allowed[:, None, :], torch.inf)
        isolation.append(part.amin(-1))
    first = _argmax(torch.cat(isolation, -1), allowed).reshape(x.shape[:-2])
    return k_center(x, k, first, candidates, weight)


@torch.no_grad()
def k_center_from_distance(distance: Tensor, k: int, pivot: Tensor) -> Tensor:
    """``k_center`` on a ready distance matrix.

    Args:
        distance: [*, n, n] symmetric pairwise distances of any float dtype (diagonal ignored).
        k: tokens to choose, 1 ≤ k ≤ n.
        pivot: [*] long, index of the first token.

    Returns:
        LongTensor [*, k], selection order, the pivot first; of equal distances the lower index.

    Raises:
        ValueError: ``k`` out of range, ``distance`` not square, or shapes or dtypes do not match.

    Source: Gonzalez 1985 (farthest-first traversal).
    """
    check_square("distance", distance)
    check_selection(distance.shape[:-1], k, None)
    _check_pivot(pivot, distance.shape[:-2])
    if distance.shape[-1] <= LONGEST_ROW and available(distance):
        from tokprune.operators.kernels.greedy import greedy_picks

        ready = rearrange(distance.float(), "... n m -> (...) n m").contiguous()
        return greedy_picks(ready, k, pivot, None, cosine=False).reshape(*pivot.shape, k)
    matrix = rearrange(distance.float(), "... n m -> (...) n m")
    rows = row_getter(matrix)

    def row(index: Tensor) -> Tensor:  # the diagonal is ignored, and the caller's matrix left alone
        return rows(index).scatter_(1, index[:, None], -torch.inf)

    state = torch.full_like(matrix[:, 0], torch.inf)
    return _greedy(row, state, k, pivot, None, _minimum_)


def cls_scores(attn_row: Tensor) -> Tensor:
    """[CLS] attention: head mean of what the class token pays to each other token.

    Args:
        attn_row: [*, H, N + 1] softmax row, key 0 is the class token.

    Returns:
        [*, N] float32, not renormalised.

    Raises:
        ValueError: ``attn_row`` has fewer than 2 dimensions or no patch key.

    Source: ToDRE, arXiv 2505.18757v2, eq. 3.
    """
    if attn_row.dim() < 2 or attn_row.shape[-1] < 2:
        raise ValueError(
            f"attn_row has shape {tuple(attn_row.shape)}; it should be [*, H, N + 1] with N ≥ 1"
        )
    return attn_row.float().mean(-2)[..., 1:]


def cls_pivot(scores: Tensor, candidates: Tensor | None = None) -> Tensor:
    """Token with the highest [CLS] attention.

    For tiled images pass the thumbnail's scores only (or mark them as candidates), for a video all
    frames in one row.

    Args:
        scores: [*, n] from ``cls_scores``.
        candidates: [*, n] bool; None means all.

    Returns:
        LongTensor [*]; of equal scores the lower index.

    Raises:
        ValueError: ``candidates`` does not match.

    Source: ToDRE, arXiv 2505.18757v2, eq. 3 and §3.2.
    """
    check_selection(scores.shape, 1, candidates)
    return _argmax(scores, candidates)


def center_pivot(x: Tensor, candidates: Tensor | None = None) -> Tensor:
    """Token with the largest cosine to the mean of the raw features.

    Args:
        x: [*, n, d] of any float dtype.
        candidates: [*, n] bool, tokens that enter the mean and may be chosen; None means all.

    Returns:
        LongTensor [*].

    Raises:
        ValueError: shapes do not match.

    Source: ToDRE, arXiv 2505.18757v2, pivot ablation ("center"; cosine to the mean is our reading).
    """
    return _argmax(_cosine_to_mean(x, candidates), candidates)


def farthest_pivot(x: Tensor, candidates: Tensor | None = None) -> Tensor:
    """Token with the smallest cosine to the mean of the raw features.

    Args, Returns and Raises as :func:`center_pivot`.

    Source: ToDRE, arXiv 2505.18757v2, pivot ablation ("farthest").
    """
    return _argmax(_cosine_to_mean(x, candidates).neg(), candidates)


def random_pivot(
    n: int,
    generator: torch.Generator | None = None,
    shape: tuple[int, ...] = (),
    candidates: Tensor | None = None,
) -> Tensor:
    """Uniformly random token.

    Args:
        n: number of tokens, at least 1.
        generator: source of randomness; the result lies on its device (CPU when None).
        shape: leading shape [*] of the result.
        candidates: [*, n] bool on the generator's device; None means all.

    Returns:
        LongTensor [*].

    Raises:
        ValueError: ``n`` < 1 or ``candidates`` does not match.

    Source: ToDRE, arXiv 2505.18757v2, pivot for towers without a class token.
    """
    check_selection(torch.Size((*shape, n)), 1, candidates)
    device = "cpu" if generator is None else generator.device
    if candidates is None:
        return torch.randint(n, shape, generator=generator, device=device)
    return _argmax(torch.rand(*shape, n, generator=generator, device=device), candidates)


# ------------------------------------------------------------------------------- internals


def _by_kernel(
    batch: Tensor, k: int, first: Tensor, candidates: Tensor | None, *, total: bool,
    weighted: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The picks [*, k] from unit rows [B, n, d], on a GPU."""
    if batch.shape[1] <= GRAM_LIMIT:
        from tokprune.operators.kernels.greedy import greedy_picks

        gram = torch.bmm(batch, batch.transpose(1, 2))
        if weighted is None:
            order = greedy_picks(gram, k, first, candidates, total=total)
        else:
            order = greedy_picks(weighted(gram), k, first, candidates, cosine=False)
    else:
        from tokprune.operators.kernels.steps import greedy_steps

        order = greedy_steps(batch, k, first, candidates, total=total)
    return order.reshape(*first.shape, k)


def _greedy(
    row: Row | None,
    state: Tensor,
    k: int,
    first: Tensor,
    candidates: Tensor | None,
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """k − 1 dependent steps: update the state [B, n] in place, take its largest entry.

    Rows hold −inf at the chosen index itself, which masks it for good in both updates.
    """
    if candidates is not None:
        state.masked_fill_(~candidates.reshape(state.shape), -torch.inf)
    order = [first.reshape(-1).to(state.device)]
    if row is not None:
        for _ in range(k - 1):
            state = combine(state, row(order[-1]))
            order.append(state.argmax(-1))
    return torch.stack(order, -1).reshape(*first.shape, k)


def _rows(batch: Tensor, finish: Callable[[Tensor], Tensor]) -> Row:
    """Rows of cosines as ``finish`` leaves them, of the whole matrix when it is small enough."""
    if batch.shape[1] <= DENSE_LIMIT:
        return _matrix_rows(finish(torch.bmm(batch, batch.transpose(1, 2))))
    features = row_getter(batch)

    def row(index: Tensor) -> Tensor:
        values = finish(torch.bmm(batch, features(index).unsqueeze(-1)).squeeze(-1))
        return values.scatter_(-1, index.unsqueeze(-1), -torch.inf)

    return row


def _matrix_rows(matrix: Tensor) -> Row:
    """Rows of a matrix [B, n, n], whose diagonal is overwritten."""
    matrix.diagonal(0, -2, -1).fill_(-torch.inf)
    return row_getter(matrix)


def row_getter(rows: Tensor) -> Row:
    """Reads row ``index[b]`` of each of ``rows`` [B, n, m]: [B] → [B, m]."""
    flat, n = rows.flatten(0, 1), rows.shape[1]
    if len(rows) == 1:
        return lambda index: flat.index_select(0, index)
    offset = torch.arange(len(rows), device=rows.device) * n
    return lambda index: flat.index_select(0, index + offset)


def _start(x: Tensor, k: int, candidates: Tensor | None) -> Tensor:
    """Unit rows [B, n, d] of checked arguments."""
    check_points(x)
    check_selection(x.shape[:-1], k, candidates)
    return _normalized(x)


def _normalized(x: Tensor) -> Tensor:
    """[*, n, d] → unit rows [B, n, d] in float32."""
    return normalize(rearrange(x, "... n d -> (...) n d").float(), dim=-1)


def _to_distance(cosine: Tensor) -> Tensor:
    return cosine.neg_().add_(1)


def _weighting(batch: Tensor, weight: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """Cosines of chosen tokens (rows) to all become distances, each times the other's weight."""
    if weight is None:
        return None
    own = _weights(batch, weight)
    return lambda cosine: _to_distance(cosine).mul_(own if cosine.dim() == 3 else own[:, 0])


def _weights(batch: Tensor, weight: Tensor) -> Tensor:
    """[B, 1, n] of ``weight`` [*, n] for ``batch`` [B, n, …]."""
    if weight.numel() != batch.shape[0] * batch.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it should hold one number for each token"
        )
    return weight.float().reshape(batch.shape[0], 1, batch.shape[1])


def _minimum_(state: Tensor, row: Tensor) -> Tensor:
    return torch.minimum(state, row, out=state)


def _argmax(score: Tensor, candidates: Tensor | None) -> Tensor:
    if candidates is None:
        return score.argmax(-1)
    # NaN-free inputs only; a candidate of score −inf would tie with the masked ones.
    return score.masked_fill(~candidates, -torch.inf).argmax(-1)


def _cosine_to_mean(x: Tensor, candidates: Tensor | None) -> Tensor:
    check_points(x)
    check_selection(x.shape[:-1], 1, candidates)
    x = x.float()
    counted = x if candidates is None else x.masked_fill(~candidates.unsqueeze(-1), 0.0)
    center = normalize(counted.sum(-2), dim=-1)  # the sum points where the mean points
    return torch.matmul(normalize(x, dim=-1), center.unsqueeze(-1)).squeeze(-1)


def _check_pivot(pivot: Tensor, shape: tuple[int, ...]) -> None:
    if pivot.dtype != torch.long or pivot.shape != torch.Size(shape):
        raise ValueError(
            f"pivot is {pivot.dtype} {tuple(pivot.shape)}; it should be torch.int64 "
            f"{tuple(shape)}, one index per set of tokens"
        )
