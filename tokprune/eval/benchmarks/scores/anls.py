"""Average normalised Levenshtein similarity, of DocVQA, InfographicVQA and ST-VQA.

Source: Biten et al. 2019 (arXiv:1905.13648), and the evaluation script of the DocVQA challenge,
which compares in lower case with single spaces, and lets a similarity of exactly 0.5 count.
"""

from __future__ import annotations

from tokprune.eval.benchmarks.base import Item

_THRESHOLD = 0.5


def anls(answer: str, item: Item) -> float:
    """The largest similarity to an accepted answer, 0 below one half."""
    said = _plain(answer)
    return max((_similarity(said, _plain(right)) for right in item.answers if right.strip()),
               default=0.0)  # fmt: skip


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    if min(len(one), len(other)) < _THRESHOLD * longest:  # so many have to be inserted
        return 0.0
    similarity = 1 - distance(one, other) / longest
    return similarity if similarity >= _THRESHOLD else 0.0


def distance(one: str, other: str) -> int:
    """Levenshtein's: insertions, deletions and replacements from one text to the other."""
    above = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        here = [row]
        for column, wanted in enumerate(other, 1):
            here.append(
                min(above[column] + 1, here[-1] + 1, above[column - 1] + (letter != wanted))
            )
        above = here
    return above[-1]
