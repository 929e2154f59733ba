"""``tokprune vllm-overrides``: what to start vLLM with."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tokprune.cli.app import app
from tokprune.cli.method import Keep, Name, Options, Setting, method_options, needed_method
from tokprune.cli.values import parse_keep


@app.command("vllm-overrides")
def vllm_overrides(
    model: Annotated[str, typer.Argument(help="Folder or name of the checkpoint, as for vLLM.")],
    setting: Setting = None,
    method: Name = None,
    keep: Keep = None,
    option: Options = None,
    max_keep: Annotated[
        str | None, typer.Option(help="The most that a request may ask for by a keep of its own.")
    ] = None,
) -> None:
    """Print the --hf-overrides by which vLLM serves a model with fewer visual tokens."""
    made = needed_method(method, method_options(keep, option), setting)
    from tokprune.vllm import overrides

    most = None if max_keep is None else parse_keep(max_keep, "--max-keep", schedule=False)
    print(json.dumps(overrides(model, made, max_keep=most)))
