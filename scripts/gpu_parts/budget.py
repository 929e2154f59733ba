"""Seconds of a run, shared out by weight; what a part leaves over goes to those after it."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """``weights``: seconds wanted by each part, in order; they are stretched or shrunk to fit."""

    def __init__(
        self, seconds: float, weights: list[float], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock, self.end = clock, clock() + seconds
        self.weights = list(weights)

    def next(self) -> float:
        """Seconds of the next part; 0 when the time is over.

        Raises:
            IndexError: no part is left.
        """
        left, weights = max(0.0, self.end - self.clock()), self.weights
        own = weights[0]
        share = left * own / sum(weights)
        self.weights = weights[1:]
        return share
