"""Budgets and options as people type them, on the command line and in settings of sweeps."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, TypeVar

from tokprune.errors import shorten

Made = TypeVar("Made")

FORMS = "a count of tokens (64) or a share of them (1/4, 0.25 or 25%)"

_COUNT = re.compile(r"[0-9]{1,18}")
_SHARE = re.compile(
    r"(?P<over>[0-9]{1,18})\s*/\s*(?P<under>[0-9]{1,18})"
    r"|(?P<number>[-+]?(?:[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+\.|inf|nan))"
    r"\s*(?P<percent>%?)"
)


def parse_budget(value: Any, name: str = "keep") -> int | float:
    """A budget of visual tokens: ``64`` is a count, ``1/4``, ``0.25`` and ``25%`` are a share.

    Args:
        value: text, or a number as settings files have it.
        name: of the option, for errors.

    Returns:
        An int of at least 1, or a float in (0, 1].

    Raises:
        ValueError: anything else; names option and value, and what would be right.
    """
    text = "" if isinstance(value, bool) else str(value).strip()
    shown = shorten(value) if isinstance(value, bool) else shorten(text)
    if _COUNT.fullmatch(text):
        if int(text) < 1:
            raise ValueError(f"{name}={text} should be at least 1 token: {FORMS}")
        return int(text)
    found = _SHARE.fullmatch(text)
    if found is None:
        raise ValueError(f"{name}={shown} should be {FORMS}")
    if found["over"]:
        over, under = int(found["over"]), int(found["under"])
        share = float(Fraction(over, under)) if under else math.inf
    else:
        share = float(found["number"]) / (100 if found["percent"] else 1)
    if not 0 < share <= 1:  # NaN is not, either
        raise ValueError(
            f"{name}={shown.strip(chr(39))} should be a share in (0, 1], or a whole number of "
            f"tokens: {FORMS}"
        )
    return share


def parse_schedule(text: str, name: str = "keep") -> Any:
    """A budget, or several with commas between them, one for each pruning step: a tuple, in which
    later steps may come to 0.

    Raises:
        ValueError: as :func:`parse_budget`.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1:
        return parse_budget(text, name)
    try:
        return tuple(0 if part == "0" else parse_budget(part, name) for part in parts)
    except ValueError as error:
        raise ValueError(f"{error}; or a schedule of these, 0.875,0.625,0.125") from None


def split_outside(text: str, separator: str) -> list[str]:
    """Parts of a text between separators, stripped; those inside brackets of any kind separate
    nothing."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == separator and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


def with_options(cls: type[Made], options: Mapping[str, Any], where: str) -> Made:
    """A dataclass made with options by name; errors begin with ``where``.

    Raises:
        ValueError: an option that it does not have, or a value that does not fit.
    """
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"{where}: {unknown[0]!r} should be one of {', '.join(known)}")
    try:
        return cls(**options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def option_value(name: str, text: str) -> Any:
    """The value of a method option: a Python literal, ``true`` and ``false`` as well; the budget
    ``keep`` in any of its forms; anything else is text.

    Raises:
        ValueError: ``keep`` is no budget.
    """
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about numbers such as 1if
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return parse_schedule(text, name) if name == "keep" else text
