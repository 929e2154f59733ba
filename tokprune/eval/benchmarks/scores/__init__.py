"""Scoring rules of benchmarks, by name: from an answer and an item to a number in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tokprune.errors import did_you_mean
from tokprune.eval.benchmarks.base import Item, exact
from tokprune.eval.benchmarks.scores.anls import anls
from tokprune.eval.benchmarks.scores.contains import contains
from tokprune.eval.benchmarks.scores.letters import letter
from tokprune.eval.benchmarks.scores.relaxed import relaxed
from tokprune.eval.benchmarks.scores.vqa import vqa
from tokprune.eval.benchmarks.scores.yes_no import mme, pope, yes_no

#: from a model's answer and the item to a score
Score = Callable[[str, Item], float]

SCORINGS: Mapping[str, Score] = {
    "exact": exact,
    "vqa": vqa,
    "anls": anls,
    "relaxed": relaxed,
    "letter": letter,
    "yes-no": yes_no,
    "pope": pope,
    "mme": mme,
    "contains": contains,
}


def check_scoring(name: str) -> str:
    """The name of a rule.

    Raises:
        ValueError: no such rule; lists what there is.
    """
    if name not in SCORINGS:
        hint = did_you_mean(name, SCORINGS)
        raise ValueError(f"scoring={name!r} should be one of {', '.join(SCORINGS)}.{hint}")
    return name
