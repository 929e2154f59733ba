"""What TRIM does with tiles, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.operators.outliers import outliers
from tokprune.operators.trim import keep_and_mean

if TYPE_CHECKING:
    from tokprune.methods.trim import TRIM


@dataclass(frozen=True, eq=False)
class Alike:
    """Tiles with equally many patches to choose from, n at least 1."""

    #: what the caller knows them by (host)
    names: list[int]
    #: number of tiles of the image of each (host)
    tiles: list[int]
    #: [m, n] long, rows of the patches in the sequence that they stand in
    rows: Tensor
    #: [m, n, D]
    features: Tensor
    #: [m, n] float32, the similarity to the question
    similarity: Tensor


@dataclass(frozen=True, eq=False)
class Squeezed:
    """What is left of a tile."""

    #: [k] long: kept patches, ascending, in the sequence
    kept: Tensor
    #: [n − k] long: those in the mean, or dropped
    others: Tensor
    #: [D], the mean; None without one
    mean: Tensor | None


def squeeze(method: TRIM, groups: Sequence[Alike]) -> dict[int, Squeezed]:
    """All tiles of a call, by name. The host reads back how many outliers there are, without a
    ``keep``."""
    scores = [group.similarity.float() * method.direction for group in groups]
    done: dict[int, Squeezed] = {}
    for group, score, budgets in zip(groups, scores, _budgets(method, groups, scores)):
        same: dict[tuple[int, bool], list[int]] = {}
        for number, budget in enumerate(budgets):
            same.setdefault(budget, []).append(number)
        for (k, mean), members in same.items():
            at = torch.tensor(members).to(score.device, non_blocking=True)
            rows = group.rows[at]
            new = keep_and_mean(group.features[at], score[at], k)
            kept, others = rows.gather(1, new.kept), rows.gather(1, new.others)
            for i, number in enumerate(members):
                last = new.out[i, -1] if mean else None
                done[group.names[number]] = Squeezed(kept[i], others[i], last)
    return done


def _budgets(
    method: TRIM, groups: Sequence[Alike], scores: Sequence[Tensor]
) -> list[list[tuple[int, bool]]]:
    """Of every tile the patches to keep, and whether a mean follows."""
    if method.keep is not None:
        return [[method.budget(x.rows.shape[1], n) for n in x.tiles] for x in groups]
    probability = [score.softmax(-1) for score in scores]
    if method.outliers == "call":
        share = outliers(torch.cat([p.flatten() for p in probability])).tolist()
        ratio = sum(share) / len(share)
        counts = [[int(ratio * p.shape[1])] * len(p) for p in probability]
    else:
        found = torch.cat([outliers(p).sum(-1) for p in probability]).tolist()
        counts = [[found.pop(0) for _ in p] for p in probability]
    sizes = [p.shape[1] for p in probability]
    return [
        [(max(1, k), method.aggregate and max(1, k) < n) for k in own]
        for own, n in zip(counts, sizes)
    ]
