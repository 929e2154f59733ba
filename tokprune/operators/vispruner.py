"""Important tokens, and of all others those that repeat each other least (VisPruner)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokprune.operators.bipartite import best_match
from tokprune.operators.checks import check_number
from tokprune.operators.diversity import DENSE_LIMIT
from tokprune.operators.topk import rank

__all__ = ["drop_duplicates", "important_and_diverse"]

#: duplicates that go in one round
ROUND = 8


@torch.no_grad()
def drop_duplicates(x: Tensor, order: Tensor, keep: int, per_round: int = ROUND) -> Tensor:
    """Shorten a list of tokens, a few of the most redundant at a time.

    In every round the list is dealt out in turn to two sides. The tokens of the first side that
    are most similar (cosine) to any of the second go; then come those of the first side that
    remain, by falling similarity, and the second side as it was. So the order decides who meets
    whom in the next round. All sizes are known beforehand: no host synchronisation.

    Args:
        x: [B, N, C] features of any float dtype; the arithmetic is float32. A zero row has cosine
            0 with everything.
        order: [B, n] long, the list: rows of ``x``, none twice.
        keep: tokens that remain, 0 ≤ keep ≤ n.
        per_round: tokens that go in one round, at least 1; fewer where a side has fewer.

    Returns:
        LongTensor [B, keep], the list after the last round; of equal similarities the token that
        stands earlier in the list goes first.

    Raises:
        ValueError: ``keep`` or ``per_round`` is out of range.

    Source: VisPruner, arXiv 2412.01818v2, duplicate removal. Lists of odd length, whose first side
    then has one more, and rounds that would take more than a side has are ours: the official code
    stops there.
    """
    if not 0 <= keep <= order.shape[1]:
        raise ValueError(
            f"keep is {keep}; it should be between 0 and the {order.shape[1]} tokens of order"
        )
    if per_round < 1:
        raise ValueError(f"per_round is {per_round}; it should be at least 1")
    if keep == 0:
        return order[:, :0]
    unit = normalize(x.float(), dim=-1)
    held = torch.bmm(unit, unit.mT) if x.shape[1] <= DENSE_LIMIT else None
    row = torch.arange(len(order), device=order.device)[:, None, None]
    while order.shape[1] > keep:
        first, second = order[:, ::2], order[:, 1::2]
        if held is not None:
            similar = held[row, first[:, :, None], second[:, None]].amax(-1)
        else:
            similar = best_match(unit, first, second)[0]
        gone = min(per_round, order.shape[1] - keep, first.shape[1])
        order = torch.cat([first.gather(1, rank(similar)[:, gone:]), second], dim=1)
    return order


def important_and_diverse(
    x: Tensor, score: Tensor, keep: int, important_ratio: float = 0.5
) -> tuple[Tensor, Tensor]:
    """The tokens of the highest score, and what :func:`drop_duplicates` leaves of all others,
    listed by falling score.

    Args:
        x: [B, N, C] features of any float dtype.
        score: [B, N], higher is more important.
        keep: tokens in all, 1 ≤ keep ≤ N; ⌊keep · important_ratio⌋ of them are important.
        important_ratio: in [0, 1].

    Returns:
        LongTensors [B, important] by falling score and [B, diverse] as the rounds leave them;
        together ``keep`` different tokens.

    Raises:
        ValueError: ``keep`` or ``important_ratio`` is out of range.

    Source: VisPruner, arXiv 2412.01818v2, section on important and diverse tokens.
    """
    check_number("keep", keep, x.shape[1])
    if not 0 <= important_ratio <= 1:
        raise ValueError(f"important_ratio is {important_ratio}; it should be in [0, 1]")
    order, important = rank(score), int(keep * important_ratio)
    return order[:, :important], drop_duplicates(x, order[:, important:], keep - important)
