"""``tokprune vllm-overrides``: what to start vLLM with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tokprune.cli.app import BadInput, app
from tokprune.cli.values import parse_keep, parse_options


@app.command("vllm-overrides")
def vllm_overrides(
    model: Annotated[str, typer.Argument(help="Folder or name of the checkpoint, as for vLLM.")],
    setting: Annotated[
        Path | None, typer.Option(help="Setting file of 'tokprune recommend'.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="A method, without a file.")] = None,
    keep: Annotated[
        str | None, typer.Option(help="Its visual tokens per image: 64, 1/4, 0.25 or 25%.")
    ] = None,
    opt: Annotated[
        list[str] | None, typer.Option(help="Its options: --opt NAME=VALUE (repeatable).")
    ] = None,
    max_keep: Annotated[
        str | None, typer.Option(help="The most that a request may ask for by a keep of its own.")
    ] = None,
) -> None:
    """Print the --hf-overrides by which vLLM serves a model with fewer visual tokens."""
    if (setting is None) == (method is None):
        raise BadInput("give a setting file or a method: --setting FILE, or --method NAME --keep N")
    from tokprune.vllm import overrides

    options = parse_options(opt or [])
    if keep is not None:
        options["keep"] = parse_keep(keep, schedule=False)
    if setting is not None and not setting.is_file():
        raise BadInput(f"--setting {setting}: no such file")
    most = None if max_keep is None else parse_keep(max_keep, schedule=False)
    chosen = str(setting) if setting is not None else method
    print(json.dumps(overrides(model, chosen, max_keep=most, **options)))  # type: ignore[arg-type]
