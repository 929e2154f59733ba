"""Option values that several commands share: budgets, method options, devices."""

from __future__ import annotations

import math
import re
from enum import Enum
from typing import Annotated, Any

import typer

from tokprune.cli.app import BadInput
from tokprune.words import option_value, parse_budget, parse_schedule, split_outside


class Device(str, Enum):
    auto, cpu, cuda = "auto", "cpu", "cuda"


TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Let code of the model's own run; without it none ever does."
    ),
]


class Dtype(str, Enum):
    auto, float32, bfloat16, float16 = "auto", "float32", "bfloat16", "float16"


def parse_list(option: str, text: str | None) -> list[str] | None:
    """Parts of ``a,b,c``; commas in brackets of any kind, as in ``name:option=(1, 2)``, separate
    nothing. None where the option is not used."""
    if text is None:
        return None
    parts = split_outside(text, ",")
    if not all(parts):
        raise BadInput(f"--{option} {text!r} should be values separated by commas, at least one")
    return parts


def parse_numbers(option: str, text: str | None, least: int = 0) -> list[int] | None:
    """Whole numbers of ``1,4``."""
    parts = parse_list(option, text)
    if parts is not None and not all(p.isdecimal() and int(p) >= least for p in parts):
        raise BadInput(
            f"--{option} {text!r} should be whole numbers separated by commas, from {least} on"
        )
    return None if parts is None else [int(part) for part in parts]


def parse_keep(text: str, option: str = "--keep", schedule: bool = True) -> Any:
    """``64`` → 64; ``1/4``, ``0.25`` and ``25%`` → 0.25; ``0.875,0.625,0.125`` → a tuple of these,
    where ``schedule`` allows it."""
    try:
        return parse_schedule(text, option) if schedule else parse_budget(text, option)
    except ValueError as error:
        raise BadInput(_as_option(error, option)) from None


def parse_amount(text: str | None, option: str) -> int | float | None:
    """A budget, or a number of tokens that need not be whole (96.5); None where the option is not
    used."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9]+\.[0-9]+", text.strip()) and float(text) > 1:
        return float(text)
    return parse_keep(text, option, schedule=False)


def parse_seconds(text: str, option: str) -> float:
    """``120ms`` or ``0.12s`` → 0.12."""
    word = text.strip().lower()
    for unit, scale in (("ms", 1e-3), ("s", 1.0)):
        if word.endswith(unit):
            try:
                value = float(word.removesuffix(unit)) * scale
            except ValueError:
                break
            if 0 < value < math.inf:
                return value
            break
    raise BadInput(f"{option} {text!r} should be a time with its unit: 120ms or 0.12s")


def _as_option(error: ValueError, option: str) -> str:
    """``--keep=x should be …`` as it was typed: ``--keep x``."""
    return str(error).replace(f"{option}=", f"{option} ", 1)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; values are Python literals, anything else is text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise BadInput(f"--option {pair!r} should be name=value")
        if name in options:
            raise BadInput(f"--option {name} is given twice")
        try:
            options[name] = option_value(name, text)
        except ValueError as error:
            raise BadInput(f"--option {error}") from None
    return options
