"""The method that a command line names: by name and options, or by a setting."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokprune.cli.app import BadInput
from tokprune.cli.values import parse_keep, parse_options

if TYPE_CHECKING:
    from tokprune.methods import Method

Name = Annotated[str | None, typer.Option(help="See 'tokprune methods'.")]
Keep = Annotated[
    str | None,
    typer.Option(
        help="Visual tokens per image: a count (64), a share (1/4, 0.25, 25%), or a schedule of "
        "these (0.875,0.625,0.125)."
    ),
]
Options = Annotated[
    list[str] | None, typer.Option(help="Method option name=value; repeat for several.")
]
Setting = Annotated[
    Path | None, typer.Option(help="JSON of 'tokprune recommend' or 'tune', instead of --method.")
]


def method_options(keep: str | None, option: list[str] | None) -> dict[str, Any]:
    """Values of ``--keep`` and ``--option``."""
    options = parse_options(option or [])
    if keep is not None:
        if "keep" in options:
            raise BadInput("give the budget once: --keep or --option keep=…")
        options["keep"] = parse_keep(keep)
    return options


def named_method(name: str | None, options: dict[str, Any], setting: Path | None) -> Method | None:
    """The method object; None where the command line names none."""
    if setting is not None and (name is not None or options):
        used = "--method" if name is not None else "--keep/--option"
        raise BadInput(f"--setting names its method and options; drop {used}")
    if name is None and setting is None:
        return None
    # imported late: torch takes seconds
    from tokprune.methods import make_method
    from tokprune.methods.setting import load_setting

    try:
        return load_setting(setting) if setting is not None else make_method(str(name), **options)
    except TypeError as error:  # an option of the wrong type
        raise BadInput(str(error)) from None


def needed_method(name: str | None, options: dict[str, Any], setting: Path | None) -> Method:
    """The same for commands that are about one."""
    made = named_method(name, options, setting)
    if made is None:
        raise BadInput("give a setting file or a method: --setting FILE, or --method NAME --keep N")
    return made
