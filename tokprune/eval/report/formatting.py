"""Numbers as people read them."""

from __future__ import annotations

import math

from tokprune.eval.report.analysis import Interval
from tokprune.eval.report.statistics import Flips

NOTHING = "–"


def percent(value: float, digits: int = 1) -> str:
    return NOTHING if math.isnan(value) else f"{100 * value:.{digits}f}"


def signed(value: float, digits: int = 1) -> str:
    """Percentage points with their sign; no sign on what rounds to zero."""
    if math.isnan(value):
        return NOTHING
    text = f"{100 * value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def between(bounds: Interval, digits: int = 1, sign: bool = False) -> str:
    low, high = bounds
    if math.isnan(low) or math.isnan(high):
        return NOTHING
    write = signed if sign else percent
    return f"[{write(low, digits)}, {write(high, digits)}]"


def with_interval(value: float, bounds: Interval) -> str:
    return NOTHING if math.isnan(value) else f"{percent(value)} {between(bounds)}"


def probability(p: float) -> str:
    if math.isnan(p):
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def changes(counted: Flips | None) -> tuple[str, str]:
    """Flips correct → incorrect and incorrect → correct."""
    return (NOTHING, NOTHING) if counted is None else (str(counted.lost), str(counted.gained))


def number(value: float, digits: int = 1) -> str:
    """A count: whole where it is whole, else with a few digits."""
    if math.isnan(value):
        return NOTHING
    return f"{value:.0f}" if abs(value - round(value)) < 1e-6 else f"{value:.{digits}f}"


def significant(value: float, digits: int = 3) -> str:
    if math.isnan(value):
        return NOTHING
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def milliseconds(seconds: float) -> str:
    return significant(1e3 * seconds)


def listed(names: list[str] | tuple[str, ...]) -> str:
    """``a, b and c``"""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
