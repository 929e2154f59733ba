"""Methods and models as a table for people."""

from __future__ import annotations

from typing import Any

from tokprune.cli.console import console
from tokprune.cli.fits import Fit

_WORDS = {"works": "works", "substitute": "works, otherwise", "refused": "refused"}
_MARKS = {"works": "✓", "substitute": "~", "refused": "–"}


def print_fits(found: dict[str, list[Fit]]) -> None:
    """One model: a line per method with what is said of it. Several: a line per model, and what is
    said below, once."""
    from rich import box
    from rich.table import Table

    if len(found) == 1:
        ((model, fits),) = found.items()
        table = Table("method", model, "what is different, or why not", box=box.SIMPLE_HEAD)
        for fit in fits:
            table.add_row(fit.method, _WORDS[fit.status], fit.why)
        console(140).print(table)
        return
    methods = [fit.method for fit in next(iter(found.values()))]
    notes: dict[str, int] = {}
    table = Table("model", *methods, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for model, fits in found.items():
        table.add_row(model, *(_cell(fit, notes) for fit in fits))
    out: Any = console(max(map(len, found)) + sum(max(6, len(name)) + 1 for name in methods) + 8)
    out.print(table)
    out.print(f"{_MARKS['works']} works   {_MARKS['substitute']} works, otherwise than published"
              f"   {_MARKS['refused']} refused")  # fmt: skip
    for why, number in notes.items():
        out.print(f"{number:2}  {why}", soft_wrap=True)


def _cell(fit: Fit, notes: dict[str, int]) -> str:
    if not fit.why:
        return _MARKS[fit.status]
    return f"{_MARKS[fit.status]} {notes.setdefault(fit.why, len(notes) + 1)}"
