"""VQA accuracy: agreement with people, after the normalisation of the VQA challenge.

Source of the rule and its tables: the evaluation of VQA (github.com/GT-Vision-Lab/VQA,
``vqaEval.py``; Antol et al. 2015, Goyal et al. 2017), which TextVQA, OK-VQA and VizWiz use as well.
"""

from __future__ import annotations

import re
from itertools import combinations

from tokprune.eval.benchmarks.base import Item

#: people that have to agree with an answer for it to count in full
_AGREEING = 3
#: fewer people than this could never give a full score
FEWEST = _AGREEING + 1

_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS.split())} | {"none": "0"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

#: words that are written with or without their apostrophes
_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've "
    "might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't "
    "shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's "
    "something'd something'd've something'll that's there'd there'd've there're there's they'd "
    "they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't "
    "would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)


def _spellings() -> dict[str, str]:
    """Every spelling with one apostrophe left out, to the full one."""
    found = {}
    for word in _APOSTROPHES.split():
        places = [place for place, letter in enumerate(word) if letter == "'"]
        for kept in combinations(places, len(places) - 1):
            short = "".join(c for n, c in enumerate(word) if c != "'" or n in kept)
            found[short] = word
    # those that follow no rule
    return found | {
        "hed": "he'd", "twas": "'twas", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at",
        "'ow'sat": "'ow's'at", "somebody'd": "somebodyd",
    }  # fmt: skip


_SPELLINGS = _spellings()


def normalised(answer: str) -> str:
    """An answer as the VQA challenge compares it: lower case, without articles and punctuation,
    number words as digits, contractions with their apostrophes.

    A mark is left out where it stands beside a space, or where the answer has a comma between
    digits; elsewhere it becomes a space. A full stop is left out unless a digit follows.
    """
    text = given = " ".join(answer.split())
    joined = _COMMA_IN_NUMBER.search(given) is not None
    for mark in _MARKS:
        beside = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if beside or joined else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", text).lower().split())
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def vqa(answer: str, item: Item) -> float:
    """Mean over all but one of the people of min(1, agreeing / 3).

    ``item.answers`` are those of all people, repetitions included. Answers are always normalised;
    the original leaves that out where all people say the same, which makes a difference only to
    answers that are not written as people write them.
    """
    said = normalised(answer)
    agree = [normalised(person) == said for person in item.answers]
    agreeing = sum(agree)
    return sum(min(1.0, (agreeing - own) / _AGREEING) for own in agree) / len(agree)
