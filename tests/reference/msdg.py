"""Groups by direction of change and their budgets, one token and one rule after the other, in
Python's own numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unit(rows: Tensor) -> Tensor:
    length = rows.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, rows / length.where(length > 0, torch.ones(())), 0.0)


def groups_of(direction: Tensor, groups: int, seed: int = 0, rounds: int = 10) -> list[int]:
    """Label of every row [n, d], all of them candidates."""
    d = unit(direction.double())
    n = len(d)
    centroids = [d[seed % n]]
    while len(centroids) < groups:
        nearest = [max(float(row @ c) for c in centroids) for row in d]
        centroids.append(d[nearest.index(min(nearest))])

    def assign() -> tuple[list[int], list[float]]:
        labels, served = [], []
        for row in d:
            likeness = [float(row @ c) for c in centroids]
            served.append(max(likeness))
            labels.append(likeness.index(served[-1]))
        return labels, served

    before: list[int] = []
    loss = 0.0
    for step in range(rounds):
        labels, served = assign()
        now = sum(1 - best for best in served) / n
        if step and (labels == before or abs(now - loss) / max(abs(loss), 1e-12) < 1e-5):
            break
        before, loss = labels, now
        worst = sorted(range(n), key=lambda i: (served[i], i))
        for c in range(groups):
            members = [i for i in range(n) if labels[i] == c]
            centroids[c] = unit(d[members].sum(0)) if members else d[worst.pop(0)]
    return assign()[0]


def budgets_of(saliency: list[float], labels: list[int], groups: int, budget: int) -> list[int]:
    size = [labels.count(c) for c in range(groups)]
    own = [[s for s, label in zip(saliency, labels) if label == c] for c in range(groups)]
    mean = [sum(values) / len(values) if values else 0.0 for values in own]
    power = [math.exp(m - max(mean)) for m in mean]
    part = [p / sum(power) for p in power]
    given = [min(size[c], math.floor(budget * part[c])) for c in range(groups)]
    left = budget - sum(given)
    open_ = [c for c in range(groups) if given[c] < size[c]]
    rest = {c: budget * part[c] - math.floor(budget * part[c]) for c in open_}
    for c in sorted(open_, key=lambda c: (-rest[c], c)):
        if left > 0:
            given[c], left = given[c] + 1, left - 1
    for c in sorted(range(groups), key=lambda c: (-part[c], c)):
        more = min(left, size[c] - given[c])
        given[c], left = given[c] + more, left - more
    return given


def salient(
    direction: Tensor, saliency: Tensor, keep: int, groups: int, sinks: list[int], seed: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """(tokens that stay, group of every token or −1, budgets) of [n, d] and [n]."""
    real = [i for i in range(len(direction)) if i not in sinks]
    known = saliency.double().tolist()
    own = groups_of(direction[real], groups, seed)
    labels = [-1] * len(direction)
    for i, label in zip(real, own):
        labels[i] = label
    number = min(keep, len(real))
    given = budgets_of([known[i] for i in real], own, groups, number)
    kept: list[int] = []
    for c in range(groups):
        members = sorted((i for i in real if labels[i] == c), key=lambda i: (-known[i], i))
        kept += members[: given[c]]
    kept += sorted(sinks, key=lambda i: (-known[i], i))[: keep - number]
    return sorted(kept), labels, given
