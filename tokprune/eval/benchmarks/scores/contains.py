"""OCRBench: the answer holds the text that was to be read."""

from __future__ import annotations

from tokprune.eval.benchmarks.base import Item

#: handwritten formulas, whose spaces and case say nothing and something
_FORMULAS = frozenset({"HME100k", "Handwritten Mathematical Expression Recognition"})


def contains(answer: str, item: Item) -> float:
    """1 where an accepted answer is part of the answer, whatever the case; formulas are compared
    with their case and without spaces.

    Source: the evaluation of OCRBench (Liu et al. 2023, arXiv:2305.07895).
    """
    exactly = item.meta.get("category") in _FORMULAS or item.meta.get("dataset") in _FORMULAS

    def plain(text: str) -> str:
        return "".join(text.split()) if exactly else " ".join(text.lower().split())

    said = plain(answer)
    return float(any(right.strip() and plain(right) in said for right in item.answers))
