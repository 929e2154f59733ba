"""Question, hint and options as one text, and which option an answer names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokprune.eval.benchmarks.base import normalise
from tokprune.eval.benchmarks.files.containers.base import short

#: the usual wording of LLaVA (``model_vqa_mmbench.py``), which VLMEvalKit and lmms-eval use for it
_ASK = "Answer with the option's letter from the given choices directly."
#: the same for MMBench-CN
_ASK_CHINESE = "请直接回答选项字母。"
_CHINESE = re.compile("[\u4e00-\u9fff]")
_PLACE = re.compile(r"<image[ _]?(\d+)>")


def multiple_choice(question: str, options: Mapping[str, str], hint: str | None = None) -> str:
    """A question with its options in lines of their own (``A. two dogs``), the hint before it and
    the request for a letter after it; an open question has no such request."""
    lines = [hint] if hint else []
    lines += [question, *(f"{letter}. {text}" for letter, text in options.items())]
    text = "\n".join(lines)
    return f"{text}\n{_ASK_CHINESE if _CHINESE.search(text) else _ASK}" if options else text


def option_meant(answer: Any, options: Mapping[str, str], where: str) -> str:
    """The letter of the correct option: given as a letter, as a number from 0, or by its text.

    Raises:
        ValueError: none of them, or one that could be two; names place and value.
    """
    names = list(options)
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        found = {chr(ord("A") + answer)} & set(names) if 0 <= answer < 26 else set()
    else:
        text = str(answer).strip()
        found = {name for name, option in options.items() if normalise(option) == normalise(text)}
        if text.upper().strip("().") in names:
            found = {text.upper().strip("().")}
        elif text.isdecimal() and len(text) < 3:
            found |= {chr(ord("A") + int(text))} & set(names)
    if len(found) == 1:
        return found.pop()
    what = f"may be {' or '.join(sorted(found))}" if found else "is none of them"
    raise ValueError(
        f"{where}: answer {short(answer)} should be one of the options {', '.join(names)}, their "
        f"numbers from 0, or their texts; it {what}"
    )


def placed(question: str, images: list[Any], where: str) -> tuple[str, list[Any]]:
    """A question whose places for images (``<image 2>``, as in MMMU) are ``<image>``, and the
    images in the order of their places.

    Raises:
        ValueError: places for other images than there are.
    """
    numbers = [int(found) for found in _PLACE.findall(question)]
    if numbers:
        order = list(dict.fromkeys(numbers))
        if max(order) > len(images) or min(order) < 1:
            raise ValueError(
                f"{where}: the question names image {max(order)}, and there are {len(images)}"
            )
        seen: set[int] = set()

        def place(match: re.Match[str]) -> str:
            number = int(match[1])
            if number in seen:  # shown already
                return f"image {number}"
            seen.add(number)
            return "<image>"

        rest = [n for n in range(1, len(images) + 1) if n not in order]
        question = "<image>" * len(rest) + _PLACE.sub(place, question)
        images = [images[n - 1] for n in [*rest, *order]]
    elif (places := question.count("<image>")) not in (0, len(images)):
        raise ValueError(
            f"{where}: the question has {places} place(s) <image>, and there are {len(images)} "
            "image(s); they should be as many, or the question without places"
        )
    return question, images
