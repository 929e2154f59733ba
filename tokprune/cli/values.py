"""Option values that several commands share: budgets, method options, devices."""

from __future__ import annotations

import ast
from enum import Enum
from typing import Any

from tokprune.cli.app import BadInput


class Device(str, Enum):
    auto, cpu, cuda = "auto", "cpu", "cuda"


class Dtype(str, Enum):
    auto, float32, bfloat16, float16 = "auto", "float32", "bfloat16", "float16"


class Harness(str, Enum):
    own = "own"
    lmms_eval = "lmms-eval"


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
