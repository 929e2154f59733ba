"""Yes or no in a free answer, by the rules of POPE, MME and VLMEvalKit."""

from __future__ import annotations

import re

from tokprune.eval.benchmarks.base import Item

_MARKS = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!.:]")


def _is(item: Item, said: str) -> float:
    return float(any(said == right.strip().lower() for right in item.answers))


def pope(answer: str, item: Item) -> float:
    """No where the first sentence holds the word ``no``, ``No`` or ``not``, otherwise yes.

    Source: the evaluation of POPE (github.com/RUCAIBox/POPE, ``evaluate.py``).
    """
    words = answer.split(".", 1)[0].replace(",", "").split()
    return _is(item, "no" if {"no", "No", "not"} & set(words) else "yes")


def mme(answer: str, item: Item) -> float:
    """Yes or no where the first four letters hold the word; anything else is incorrect.

    Source: the evaluation tool of MME (Fu et al. 2023, ``calculation.py``).
    """
    start = answer.strip().lower()[:4]
    return _is(item, next((word for word in ("yes", "no") if word in start), ""))


def yes_no(answer: str, item: Item) -> float:
    """Yes or no where exactly one of the two words is in the answer; anything else is incorrect.

    Source: VLMEvalKit (``YOrN_Extraction``).
    """
    found = {"yes", "no"} & set(_MARKS.sub(" ", answer.lower()).split())
    return _is(item, found.pop() if len(found) == 1 else "")
