"""When a ratio of times may be called a speed-up: only beyond the noise of its own measurement.

Ratios are taken within rounds (baseline ÷ variant), so that drift of the machine cancels, and their
median gets a distribution-free confidence interval (order statistics; inverting the sign test).
The floor comes from an A/A control: the unpruned model against itself, measured like any variant.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: coverage of the intervals; at least 6 rounds are needed for it
CONFIDENCE = 0.95
LEAST_ROUNDS = 6


@dataclass(frozen=True)
class Interval:
    """Median of values and its confidence interval; ``low`` and ``high`` are infinitely far away
    where there are too few values for an interval."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Distribution-free interval for the median at :data:`CONFIDENCE`.

        Raises:
            ValueError: no values, or one that is not finite.
        """
        if not values or not all(math.isfinite(v) for v in values):
            raise ValueError(f"values={list(values)!r} should be finite numbers, at least one")
        ordered, n = sorted(values), len(values)
        median = statistics.median(ordered)
        if n < LEAST_ROUNDS:
            return cls(median, -math.inf, math.inf, n)
        # the binomial's lower quantile: how many values may lie beyond each end of the interval
        tail, outside = 2.0**-n, 0
        while tail < (1 - CONFIDENCE) / 2:
            outside += 1
            tail += math.comb(n, outside) / 2**n
        return cls(median, ordered[outside - 1], ordered[n - outside], n)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; a missing bound is None."""
        return {n: v if math.isfinite(v) else None for n, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Interval:
        low = -math.inf if data["low"] is None else data["low"]
        high = math.inf if data["high"] is None else data["high"]
        return cls(data["median"], low, high, data["n"])


@dataclass(frozen=True)
class Verdict:
    """Whether a ratio is a finding."""

    ratio: Interval
    #: the median ratio baseline ÷ variant (above 1: faster, below: slower), None within noise
    speedup: float | None
    #: why it is within noise, and what the median would have to pass at this scatter
    reason: str | None
    needs: float | None

    @property
    def faster(self) -> bool:
        return self.speedup is not None and self.speedup > 1

    def __str__(self) -> str:
        return f"{self.speedup:.2f}×" if self.speedup is not None else str(self.reason)

    def to_dict(self) -> dict[str, Any]:
        return {
            "speedup": self.speedup,
            "reason": self.reason,
            "needs": self.needs,
            "ratio": self.ratio.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Verdict:
        ratio = Interval.from_dict(data["ratio"])
        return cls(ratio, data["speedup"], data["reason"], data["needs"])


def noise_floor(first: Sequence[float], second: Sequence[float]) -> float:
    """How far from 1 a ratio of two equal variants may lie, as a factor ≥ 1: the farther end of the
    A/A interval. Infinite below :data:`LEAST_ROUNDS` rounds.

    Args:
        first, second: seconds of the two equal variants, round by round.
    """
    interval = Interval.of(_ratios(first, second))
    if not math.isfinite(interval.high):
        return math.inf
    return max(interval.high, 1 / interval.low)


def judge(baseline: Sequence[float], variant: Sequence[float], floor: float = 1.0) -> Verdict:
    """Whether ``variant`` is faster (or slower) than ``baseline`` beyond noise.

    A speed-up is claimed where the whole interval of the median ratio lies above ``floor``, a
    slow-down where it lies below ``1 / floor``.

    Args:
        baseline, variant: seconds, round by round.
        floor: of :func:`noise_floor`.

    Raises:
        ValueError: different numbers of rounds, a time that is not positive, ``floor`` below 1.
    """
    if not floor >= 1:
        raise ValueError(f"floor={floor} should be at least 1")
    ratio = Interval.of(_ratios(baseline, variant))
    if ratio.n < LEAST_ROUNDS:
        reason = f"too few rounds ({ratio.n}; at least {LEAST_ROUNDS} are needed)"
        return Verdict(ratio, None, reason, None)
    if ratio.low > floor or ratio.high < 1 / floor:
        return Verdict(ratio, ratio.median, None, None)
    if ratio.median >= 1:
        needs = floor * ratio.median / ratio.low
        reason = f"within noise ({ratio.median:.2f}×, needs > {_up(needs)}×)"
    else:
        needs = ratio.median / ratio.high / floor
        reason = f"within noise ({ratio.median:.2f}×, needs < {_down(needs)}×)"
    return Verdict(ratio, None, reason, needs)


def _ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Round by round ``over`` ÷ ``under``."""
    if len(over) != len(under):
        raise ValueError(f"{len(over)} and {len(under)} rounds; both should have as many")
    for value in (*over, *under):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"a time of {value!r} seconds; it should be positive")
    return [a / b for a, b in zip(over, under)]


def _up(value: float) -> str:
    """Two decimals, rounded away from 1, so that what is printed suffices."""
    return f"{math.ceil(100 * value) / 100:.2f}" if math.isfinite(value) else "∞"


def _down(value: float) -> str:
    return f"{math.floor(100 * value) / 100:.2f}"
