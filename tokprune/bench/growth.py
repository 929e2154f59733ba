"""How time grows with a size: the exponent b of seconds = a · sizeᵇ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tokprune.bench.gate import Interval


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of the least-squares line through (log size, log seconds).

    Raises:
        ValueError: fewer than two different sizes, unequal numbers, a value that is not positive.
    """
    if len(sizes) != len(seconds):
        raise ValueError(f"{len(sizes)} sizes and {len(seconds)} times; both should be as many")
    if len(set(sizes)) < 2:
        raise ValueError(f"sizes={list(sizes)} should hold at least two different numbers")
    if bad := [v for v in (*sizes, *seconds) if not (math.isfinite(v) and v > 0)]:
        raise ValueError(f"{bad[0]!r} among sizes and times; all should be positive")
    logs = ([math.log(v) for v in values] for values in (sizes, seconds))
    return statistics.linear_regression(*logs).slope


def growth(rounds: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """Growth of something measured at several sizes, round by round.

    Every round gives an exponent of its own; the interval is that of their median
    (:mod:`tokprune.bench.gate`), so it tells the noise of the measurement. Whether the points lie
    on a line at all is said by the exponents of neighbouring sizes.

    Args:
        rounds: seconds at each size, as many rounds at every size; at least two sizes.

    Returns:
        JSON types: ``sizes``; ``seconds``, the medians; ``exponent``, an interval; ``between``, the
        exponent from every size to the next, of the medians.

    Raises:
        ValueError: see :func:`exponent`; unequal numbers of rounds.
    """
    sizes = sorted(rounds)
    counts = {len(rounds[size]) for size in sizes}
    if len(counts) != 1 or not min(counts):
        raise ValueError(f"rounds of {sorted(counts)} measurements; all should have as many")
    slopes = [exponent(sizes, times) for times in zip(*(rounds[size] for size in sizes))]
    medians = [statistics.median(rounds[size]) for size in sizes]
    return {
        "sizes": sizes,
        "seconds": medians,
        "exponent": Interval.of(slopes).to_dict(),
        "between": [
            exponent(sizes[n : n + 2], medians[n : n + 2]) for n in range(len(sizes) - 1)
        ],
    }  # fmt: skip
