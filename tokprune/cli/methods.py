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
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Say which methods work on it: a family ('qwen2.5-vl'), a model class, a model "
            "folder, or 'all' families; repeat for several."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods: where they act, what they read, published budgets, paper; or, with
    --model, which of them work on a model."""
    import fnmatch

    from tokprune.methods import available_methods

    found = {n: c for n, c in available_methods().items() if fnmatch.fnmatch(n, pattern.lower())}
    if not found:
        raise BadInput(f"no method matches {pattern!r}; known: {', '.join(available_methods())}")
    if model:
        _on_models(model, set(found), as_json)
        return
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
            if (told := _budget(cls, preset)) not in listed:
                listed.append(told)
        table.add_row(
            cls.name,
            ", ".join(cls.stages),
            cls.needs,
            "\n".join(f"{model}: {', '.join(values)}" for model, values in budgets.items()),
            cls.paper,
        )
    console(160).print(table)


def _on_models(models: list[str], wanted: set[str], as_json: bool) -> None:
    """Which of the methods work on which of the models."""
    import dataclasses

    from tokprune.cli.fit_table import print_fits
    from tokprune.cli.fits import fits
    from tokprune.cli.known_models import facts_of, family_names

    names = list(dict.fromkeys(n for m in models for n in (family_names() if m == "all" else [m])))
    found = {n: [f for f in fits(facts_of(n)) if f.method in wanted] for n in names}
    if as_json:
        told = {n: [dataclasses.asdict(f) for f in own] for n, own in found.items()}
        print(json.dumps(told, indent=2))
    else:
        print_fits(found)


def _budget(cls: Any, preset: Any) -> str:
    """A published budget, and the mean over the decoder's layers where that is another number."""
    from tokprune.methods.base import preset_mean

    mean = preset_mean(cls, preset)
    same = (
        mean is None or isinstance(preset.budget, float) or str(round(mean)) == str(preset.budget)
    )
    return str(preset.budget) if same else f"{preset.budget} (mean {mean:.0f})"


def _describe(cls: Any) -> dict[str, Any]:
    import dataclasses

    from tokprune.methods.base import preset_mean

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
        "presets": [
            {**dataclasses.asdict(p), "mean_tokens": preset_mean(cls, p)} for p in cls.presets
        ],
    }
