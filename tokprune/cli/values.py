"""Option values that several commands share: budgets, method options, devices."""

from __future__ import annotations

import ast
from enum import Enum
from typing import Annotated, Any

import typer

from tokprune.cli.app import BadInput


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
    """Parts of ``a,b,c``; commas in brackets, as in ``name:option=(1, 2)``, separate nothing. None
    where the option is not used."""
    if text is None:
        return None
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    parts.append(text[start:].strip())
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


def parse_keep(text: str) -> Any:
    """``64`` → 64, ``0.11`` → 0.11, ``0.875,0.625,0.125`` → a tuple of these."""
    try:
        parts = [int(p) if p.lstrip("+-").isdigit() else float(p)
                 for p in (part.strip() for part in text.split(","))]  # fmt: skip
    except ValueError:
        raise BadInput(
            f"--keep {text!r} should be a count (64), a fraction (0.11) or a schedule of these "
            "(0.875,0.625,0.125)"
        ) from None
    return parts[0] if len(parts) == 1 else tuple(parts)


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
            options[name] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            options[name] = text.strip()
    return options
