"""SparseVLM's token recycling in loops."""

from __future__ import annotations

import math

from torch import Tensor


def recycle(x: Tensor, clusters: int) -> tuple[list[int], list[list[int]]]:
    """Centres, and members of each cluster, of vectors [M, D]; loops in float64."""
    m, d = x.shape
    x = x.double()
    apart = [[float((a - b).norm()) / math.sqrt(d) for b in x] for a in x]
    density = [-sum(v * v for v in sorted(row)[:clusters]) / clusters for row in apart]
    widest = max(max(row) for row in apart)
    score = []
    for i in range(m):
        higher = [apart[i][j] for j in range(m) if density[j] > density[i]]
        delta = min(higher, default=widest)
        score.append(density[i] + math.log(delta) if delta else -math.inf)
    centres = sorted(range(m), key=lambda i: -score[i])[:clusters]
    members: list[list[int]] = [[] for _ in centres]
    for i in range(m):
        home = (
            centres.index(i)
            if i in centres
            else min(range(clusters), key=lambda c: apart[i][centres[c]])
        )
        members[home].append(i)
    return centres, members
