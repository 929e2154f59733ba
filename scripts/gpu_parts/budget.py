"""Seconds of a run, given out in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


class Budget:
    """``wants``: seconds that each part wants, most wanted part first. Where there is time for all
    of them they share it in these proportions; else each gets what it wants until the time is over:
    half of the rounds everywhere would be worth less than all of them somewhere."""

    def __init__(
        self,
        seconds: float,
        wants: Sequence[float],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock, self.end, self.wants = clock, clock() + seconds, list(wants)

    def next(self) -> float:
        """Seconds of the next part; 0 when the time is over.

        Raises:
            IndexError: no part is left.
        """
        left, wanted = max(0.0, self.end - self.clock()), sum(self.wants)
        own = self.wants.pop(0)
        return left * own / wanted if wanted <= left else min(own, left)
