"""``tokprune methods``: what there is."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from tokprune.cli.app import BadInput, app
from tokprune.cli.console import console


@app.command()
def methods(
    pattern: Annotated[str, typer.Argument(help="Only names that match, e.g. 'vision*'.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods: where they act, what they read, published budgets, paper."""
    import fnmatch

    from tokprune.methods import available_methods

    found = {n: c for n, c in available_methods().items() if fnmatch.fnmatch(n, pattern.lower())}
    if not found:
        raise BadInput(f"no method matches {pattern!r}; known: {', '.join(available_methods())}")
    if as_json:
        print(json.dumps([_describe(cls) for cls in found.values()], indent=2))
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("name", "stages", "needs", "published budgets", "paper"):
        table.add_column(name, no_wrap=name == "name", overflow="fold")
    for cls in found.values():
        budgets: dict[str, list[str]] = {}
        for preset in cls.presets:
            listed = budgets.setdefault(preset.model, [])
            if str(preset.budget) not in listed:
                listed.append(str(preset.budget))
        table.add_row(
            cls.name,
            ", ".join(cls.stages),
            cls.needs,
            "\n".join(f"{model}: {', '.join(values)}" for model, values in budgets.items()),
            cls.paper,
        )
    console(160).print(table)


def _describe(cls: Any) -> dict[str, Any]:
    import dataclasses

    return {
        "name": cls.name,
        "class": cls.__name__,
        "stages": list(cls.stages),
        "needs": cls.needs,
        "paper": cls.paper,
        "options": {
            f.name: None if f.default is dataclasses.MISSING else f.default
            for f in dataclasses.fields(cls)
            if f.init
        },
        "presets": [dataclasses.asdict(p) for p in cls.presets],
    }
