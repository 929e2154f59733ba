"""Options are checked by their annotations: one place for the words of every error.

An annotation says what a value may be: a ``Literal`` its choices, ``bool``, ``int`` and ``float``
their kind, and the aliases below, or ``Annotated[float, Range(0, 1)]``, what else must hold. With
``| None`` None passes. What no annotation can say stands in the method's own ``__post_init__``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

Check = Callable[[Any, str], object]


def is_number(value: Any) -> bool:
    """A number that a float32 can hold."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and -_LARGEST <= value <= _LARGEST


_LARGEST = 3.4e38


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_sequence(value: Any) -> bool:
    """Values in an order: a list or tuple, but no text and no bytes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def check_keep(keep: Any, name: str = "keep") -> int | float:
    """A valid single budget: a positive count, or a fraction in (0, 1].

    Raises:
        ValueError: zero, negative, NaN, or a fraction above 1.
        TypeError: not a number.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(
            f"{name}={keep!r} should be a number of tokens (int ≥ 1) or a fraction (0 < float ≤ 1)"
        )
    if isinstance(keep, int):
        if keep < 1:
            raise ValueError(f"{name}={keep} should be at least 1 token")
    elif not math.isfinite(keep) or not 0 < keep <= 1:
        raise ValueError(
            f"{name}={keep} should be a fraction in (0, 1], or a whole number of tokens as int"
        )
    return keep


def check_range(value: Any, name: str, low: float, high: float, low_open: bool = False) -> None:
    """``low ≤ value ≤ high`` (``low_open``: strictly above), or a ValueError naming the option."""
    if not (is_number(value) and low <= value <= high) or (low_open and value == low):
        bracket = "(" if low_open else "["
        raise ValueError(f"{name}={value!r} should be in {bracket}{low:g}, {high:g}]")


def check_choice(value: Any, name: str, choices: Sequence[Any]) -> None:
    """One of the choices, or a ValueError naming the option and all of them."""
    if not any(value is choice or (value == choice) is True for choice in choices):
        raise ValueError(f"{name}={value!r} should be one of {', '.join(map(repr, choices))}")


def check_layers(layers: Any, name: str, first: int = 0) -> None:
    """One layer number, or a sequence of different ones, ascending, none below ``first``.

    Raises:
        ValueError: it is empty or something else.
    """
    several = (layers,) if is_whole(layers) else layers
    fine = is_sequence(several) and len(several) > 0 and all(
        is_whole(x) and x >= first for x in several
    )  # fmt: skip
    if not fine or list(several) != sorted(set(several)):
        raise ValueError(
            f"{name}={layers!r} should be a layer number (counted from 0), or a sequence of "
            f"ascending layer numbers, from {first} on"
        )


def check_video_unit(video_unit: Any, name: str = "video_unit") -> None:
    """What of a video is compressed as one.

    Raises:
        ValueError: it is neither "video" nor "frame" nor a whole number of frames.
    """
    if video_unit not in ("video", "frame") and not (is_whole(video_unit) and video_unit >= 1):
        raise ValueError(
            f"{name}={video_unit!r} should be 'video', 'frame', or a number of frames (at least 1)"
        )


@dataclass(frozen=True)
class Range:
    """A finite number from ``low`` to ``high`` (``low_open``: above ``low``)."""

    low: float
    high: float = math.inf
    low_open: bool = False

    def __call__(self, value: Any, name: str) -> None:
        check_range(value, name, self.low, self.high, self.low_open)


@dataclass(frozen=True)
class AtLeast:
    """A whole number that is not below ``least``."""

    least: int

    def __call__(self, value: Any, name: str) -> None:
        if not is_whole(value) or value < self.least:
            raise ValueError(f"{name}={value!r} should be a whole number, at least {self.least}")


def check_seed(value: Any, name: str) -> None:
    """What seeds a random generator, or a ValueError naming the option."""
    if not is_whole(value) or not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}={value!r} should be a whole number of at most 63 bits")


@dataclass(frozen=True)
class LayerNumbers:
    """One or several ascending layer numbers from ``first`` on."""

    first: int = 0

    def __call__(self, value: Any, name: str) -> None:
        check_layers(value, name, self.first)


#: visual tokens of an image to keep: a count, or a fraction of them
Budget = Annotated[int | float, check_keep]
#: a budget, or one for each of several pruning steps (checked where the steps are known)
BudgetSchedule = int | float | Sequence[int | float]
#: of a random generator
Seed = Annotated[int, check_seed]
#: decoder layers, 0-based: what is pruned goes before they run
PruneBefore = Annotated[int | tuple[int, ...], LayerNumbers()]


@functools.cache
def hints_of(cls: Any) -> dict[str, Any]:
    """The annotation of every option of a class, ``Any`` where it cannot be read."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        names = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
        for name, hint in inspect.get_annotations(base).items():
            try:
                hints[name] = eval(hint, dict(names)) if isinstance(hint, str) else hint
            except (NameError, TypeError, AttributeError):  # names of a function, or for mypy only
                hints[name] = Any
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _checks(cls: Any) -> tuple[tuple[str, Check], ...]:
    """Name and check of every option of a class that has one."""
    return tuple(
        (name, check) for name, hint in hints_of(cls).items() for check in _from_hint(hint)
    )


def _from_hint(hint: Any) -> Iterator[Check]:
    """Checks that an annotation asks for; none for kinds that are not known here."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        yield from (part for part in parts[1:] if callable(part))
    elif typing.get_origin(hint) is Literal:
        yield lambda value, name: check_choice(value, name, parts)
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        others = [part for part in parts if part is not type(None)]
        if len(others) == 1 and len(parts) == 2:
            if typing.get_origin(others[0]) is Literal:
                choices = (*typing.get_args(others[0]), None)
                yield lambda value, name: check_choice(value, name, choices)
            else:
                yield from (_or_none(check) for check in _from_hint(others[0]))
    elif hint is bool:
        yield lambda value, name: check_choice(value, name, (True, False))
    elif hint is int:
        yield _whole
    elif hint is float:
        yield _number


def _or_none(check: Check) -> Check:
    return lambda value, name: None if value is None else check(value, name)


def _whole(value: Any, name: str) -> None:
    if not is_whole(value):
        raise ValueError(f"{name}={value!r} should be a whole number")


def _number(value: Any, name: str) -> None:
    if not is_number(value):
        raise ValueError(f"{name}={value!r} should be a finite number")


def check_options(method: Any) -> None:
    """Every option of a method against its annotation.

    Raises:
        ValueError, TypeError: names the option, its value, and what would be right.
    """
    cls: Any = type(method)
    for name, check in _checks(cls):
        check(getattr(method, name), name)


@dataclass(frozen=True)
class Renamed:
    """An option that settings of the release before know as ``old``; ``shift`` is added to layer
    numbers that were counted in another way."""

    old: str
    name: str
    shift: int = 0

    def value(self, value: Any) -> Any:
        if is_whole(value):
            return value + self.shift
        if isinstance(value, Sequence) and not isinstance(value, str) and self.shift:
            return tuple(x + self.shift for x in value)
        return value
