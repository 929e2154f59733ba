"""Relaxed accuracy of ChartQA: numbers may be off by five per cent.

Source: Masry et al. 2022 (arXiv:2203.10244), as computed by pix2struct (``relaxed_correctness``):
a percentage is its number divided by 100, and a target of 0 is compared as text.
"""

from __future__ import annotations

import math
import re

from tokprune.eval.benchmarks.base import Item

_TOLERANCE = 0.05
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def relaxed(answer: str, item: Item) -> float:
    """1 where the answer is within 5 % of an accepted number, or the same text; else 0."""
    return float(any(_same(answer.strip(), right.strip()) for right in item.answers if right))


def _same(answer: str, right: str) -> bool:
    said, wanted = _number(answer), _number(right)
    if said is None or not wanted:
        return answer.lower() == right.lower()
    return abs(said - wanted) <= _TOLERANCE * abs(wanted)


def _number(text: str) -> float | None:
    plain = text.removesuffix("%").rstrip()
    if not _NUMBER.fullmatch(plain) or not math.isfinite(value := float(plain)):
        return None
    return value / 100 if text.endswith("%") else value
