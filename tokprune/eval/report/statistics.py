"""Intervals and tests for answers that are correct or incorrect, vectorised over tables of them.

Everything takes plain arrays, so it can be used without a run folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

#: a score from here on counts as a correct answer where correct and incorrect are counted
CORRECT = 0.5


def wilson(correct: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927; Newcombe 1998, method 3).

    Args:
        correct: number of correct answers; fractions are allowed where scores are fractional, then
            the interval is at least as wide as it need be (no variable in [0, 1] varies more than
            a correct-or-incorrect one with the same mean).
        n: number of questions.
        level: of confidence.

    Returns:
        Lower and upper bound in [0, 1]; (0, 1) for no questions at all.

    Raises:
        ValueError: ``correct`` outside [0, n], or ``level`` outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level!r} should be between 0 and 1, for example 0.95")
    if n == 0:
        return 0.0, 1.0
    if not 0 <= correct <= n:
        raise ValueError(f"correct={correct!r} should be between 0 and n={n}")
    z = float(stats.norm.ppf(0.5 + level / 2))
    share = correct / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # the formula is exact at the ends, floating point is not
    low = 0.0 if correct == 0 else min(max(0.0, float(middle - half)), share)
    high = 1.0 if correct == n else max(min(1.0, float(middle + half)), share)
    return low, high


@dataclass(frozen=True)
class Flips:
    """Paired answers of two variants to the same ``n`` questions.

    ``lost``: correct in the first, incorrect in the second; ``gained``: the other way round.
    """

    n: int
    lost: int
    gained: int

    @property
    def p(self) -> float:
        """Exact two-sided McNemar p."""
        return mcnemar(self.lost, self.gained)


def flips(first: ArrayLike, second: ArrayLike) -> Flips:
    """Count the flips between two variants.

    Args:
        first, second: [items] scores; NaN where a variant has no answer. Items that either lacks
            are left out.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    both = ~np.isnan(a) & ~np.isnan(b)
    a_right, b_right = a[both] >= CORRECT, b[both] >= CORRECT
    return Flips(int(both.sum()), int((a_right & ~b_right).sum()), int((~a_right & b_right).sum()))


def mcnemar(lost: ArrayLike, gained: ArrayLike) -> Any:
    """Exact McNemar test: two-sided binomial test of ``lost`` in ``lost + gained`` flips.

    Args:
        lost, gained: counts, or arrays of counts of one shape.

    Returns:
        p of that shape; 1 where nothing flipped. Under p = ½ the distribution is symmetric, so
        twice the smaller tail is what ``scipy.stats.binomtest`` gives.
    """
    b, c = np.asarray(lost), np.asarray(gained)
    p = np.minimum(1.0, 2 * stats.binom.cdf(np.minimum(b, c), b + c, 0.5))
    return float(p) if p.ndim == 0 else p


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """p-values adjusted for their number (Holm 1979); NaN entries are no tests and stay NaN."""
    values = np.asarray(p, float)
    adjusted = np.full(values.shape, np.nan)
    real = np.flatnonzero(~np.isnan(values))
    order = real[np.argsort(values.flat[real], kind="stable")]
    steps = values.flat[order] * (len(order) - np.arange(len(order)))
    adjusted.flat[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else steps
    return adjusted


def agreement(first: ArrayLike, second: ArrayLike, counted: ArrayLike) -> float:
    """Loyalty: share of the ``counted`` items with equal answers; NaN for none.

    Args:
        first, second: [items] answers in the form in which they are compared.
        counted: [items] bool.
    """
    where = np.asarray(counted, bool)
    if not where.any():
        return float("nan")
    return float((np.asarray(first)[where] == np.asarray(second)[where]).mean())
