"""Where tables go: the terminal as it is, or a fixed width where there is none."""

from __future__ import annotations

from typing import Any


def console(width: int, *, stderr: bool = False) -> Any:
    """A console that prints text as it is: no markup, no colours of its own."""
    from rich.console import Console

    plain: dict[str, Any] = {
        "highlight": False, "markup": False, "emoji": False, "stderr": stderr,
    }  # fmt: skip
    found = Console(**plain)
    return found if found.is_terminal else Console(width=width, **plain)
