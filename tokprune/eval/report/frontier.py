"""The Pareto frontier: settings that nothing beats in accuracy and cost at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def frontier(cost: ArrayLike, accuracy: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point dominates.

    A point dominates another if it costs no more, is no less accurate, and is better in at least
    one of them. Equal points do not dominate each other.

    Args:
        cost: [points] or [points, costs], smaller is better.
        accuracy: [points], larger is better.

    Returns:
        [points] bool; points with a NaN are never on the frontier.

    Raises:
        ValueError: different numbers of points.
    """
    gain = np.asarray(accuracy, float)
    costs = np.asarray(cost, float)
    if len(costs) != len(gain):
        raise ValueError(f"{len(costs)} costs and {len(gain)} accuracies should be as many")
    costs = costs.reshape(len(gain), -1 if len(gain) else 1)
    real = ~(np.isnan(gain) | np.isnan(costs).any(1))
    result = np.zeros(len(gain), dtype=bool)
    kept = np.flatnonzero(real)
    c, a = costs[kept], gain[kept]
    no_worse = (c[:, None] <= c[None]).all(2) & (a[:, None] >= a[None])
    better = (c[:, None] < c[None]).any(2) | (a[:, None] > a[None])
    result[kept] = ~(no_worse & better).any(0)
    return result
