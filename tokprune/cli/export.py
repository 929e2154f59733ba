"""``tokprune export``: a setting in the words of another engine."""

from __future__ import annotations

import json
import re
import sys
from typing import Annotated

import typer

from tokprune.cli.app import BadInput, app
from tokprune.cli.method import Keep, Name, Options, Setting, method_options, needed_method


@app.command("export")
def export_setting(
    to: Annotated[
        str,
        typer.Option(help="openvino (OpenVINO GenAI), sglang, or edge-llm (TensorRT Edge-LLM)."),
    ],
    model: Annotated[
        str | None, typer.Argument(help="Folder or name of the checkpoint; its config is read.")
    ] = None,
    setting: Setting = None,
    method: Name = None,
    keep: Keep = None,
    option: Options = None,
    image_size: Annotated[
        str | None,
        typer.Option(help="A usual image as WIDTHxHEIGHT, with MODEL: what a count is a share of."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Instead: visual tokens of an image (evs: of a video).")
    ] = None,
) -> None:
    """Print what another engine takes for a setting, as JSON, and on stderr how near it is."""
    made = needed_method(method, method_options(keep, option), setting)
    from tokprune.export import export

    found = export(made, to, model=model, image_size=_size(image_size), tokens=tokens)
    print(json.dumps(found.options))
    print(found.how, *(f"- {own}" for own in found.nearness), sep="\n", file=sys.stderr)


def _size(text: str | None) -> tuple[int, int] | None:
    """(width, height) of ``448x672``."""
    if text is None:
        return None
    parts = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
    if parts is None:
        raise BadInput(f"--image-size {text!r} should be WIDTHxHEIGHT in pixels, such as 448x672")
    return int(parts[1]), int(parts[2])
