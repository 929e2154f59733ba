"""Multiple choice: which option a free answer means.

Sources of the conventions: MMBench and VLMEvalKit (``can_infer``: a letter that stands alone, then
the one option whose text is in the answer; ``A`` within a sentence may be an article), ScienceQA in
LLaVA ("The answer is B."), lmms-eval (the letter that an answer begins with).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tokprune.eval.benchmarks.base import Item, normalise

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: a letter at the beginning that a mark or the end follows: "B", "(b)", "B. two dogs", "**B**"
_FIRST = re.compile(r"[\s(\[*\"']*([A-Za-z])\s*(?:[)\].:,*\"']|$|\n)")
_STATED = re.compile(
    r"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?:\s+is)?\s*:?\s*[(\[*\"']*([A-Z])(?![A-Za-z0-9'])"
)
_ALONE = re.compile(r"(?<![A-Za-z0-9'])([A-Z])(?![A-Za-z0-9'])")
#: words that are letters, too
_WORDS = frozenset("AI")
#: an answer with more words than this is a sentence
_SENTENCE = 3


def letter(answer: str, item: Item) -> float:
    """1 where the answer means the correct option, by its letter or its text; else 0.

    ``item.meta["options"]`` has the texts by letter; without them any letter is an option, and an
    item whose accepted answers are no letters is compared exactly.
    """
    right = {text.strip().upper().strip("().") for text in item.answers}
    options = item.meta.get("options") or {}
    if not options and not all(len(name) == 1 and name in _LETTERS for name in right):
        said = normalise(answer)
        return float(any(said == normalise(text) for text in item.answers))
    return float(chosen(answer, options) in right)


def chosen(answer: str, options: Mapping[str, str] | None = None) -> str | None:
    """The letter of the option that an answer means, None where it means none, or several.

    Args:
        answer: free text.
        options: text by letter; empty where they are not known.
    """
    named = {name: normalise(text) for name, text in (options or {}).items()}
    letters = set(named) or set(_LETTERS)
    said = normalise(answer)
    same = [name for name, text in named.items() if text and text == said]
    if len(same) == 1:
        return same[0]
    for pattern in (_FIRST, _STATED):
        found = pattern.match(answer) if pattern is _FIRST else pattern.search(answer)
        if found and found[1].upper() in letters:
            return found[1].upper()
    alone = {name for name in _ALONE.findall(answer) if name in letters}
    if len(answer.split()) > _SENTENCE:
        alone -= _WORDS
    if len(alone) == 1:
        return alone.pop()
    if alone or len(said) > 2 * sum(map(len, named.values())):
        return None
    held = [
        name for name, text in named.items()
        if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", said)
    ]  # fmt: skip
    return held[0] if len(held) == 1 else None
