"""``tokprune exec``: any script, unmodified, compressed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokprune.cli.app import BadInput, app
from tokprune.cli.console import console
from tokprune.cli.method import Keep, Name, Options, Setting, method_options, named_method

if TYPE_CHECKING:
    from tokprune.integrations.exec.verdict import Verdict

#: exit code of a command that ended well and did not compress all that it should have
NOT_COMPRESSED = 3


@app.command(
    "exec",
    context_settings={"allow_extra_args": True},
    options_metavar="[OPTIONS] -- COMMAND | -m MODULE | SCRIPT.py [ARGS]...",
)
def execute(
    context: typer.Context,
    method: Name = None,
    keep: Keep = None,
    option: Options = None,
    setting: Setting = None,
    strict: Annotated[
        bool,
        typer.Option(
            help="Fail where a model answered without compression, or none was loaded; else say so."
        ),
    ] = True,
    numbers: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this file as well.")
    ] = None,
) -> None:
    """Run a command with compressed visual tokens, whatever script it is.

    Every supported model that from_pretrained returns in it is patched, in all Python processes
    that it starts (subprocesses, accelerate launch, torchrun). A summary goes to stderr at the end.
    The exit code is the command's, or 3 where that is 0 and --strict found something uncompressed.
    """
    words = list(context.args)
    if not words or words == ["-m"]:
        raise BadInput("what to run is missing: -- python SCRIPT.py [ARGS]..., or -- -m MODULE ...")
    made = named_method(method, method_options(keep, option), setting)
    if made is None:
        raise BadInput("give --method (see 'tokprune methods') or --setting")
    if numbers is not None and not numbers.parent.is_dir():
        raise BadInput(f"--json {numbers}: no such folder {numbers.parent}")
    from tokprune.integrations.exec.run import run_patched
    from tokprune.integrations.exec.verdict import Verdict

    code, events = run_patched(words, made, strict)
    verdict = Verdict.of(events)
    _print(verdict)
    failed = strict and bool(verdict.problems)
    if numbers is not None:
        value = {"command": words, "method": repr(made), "exit_code": code, **asdict(verdict)}
        numbers.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    sys.exit(code or (NOT_COMPRESSED if failed else 0))


def _print(verdict: Verdict) -> None:
    from rich import box
    from rich.table import Table

    shown = console(100, stderr=True)
    if verdict.table is not None:
        shown.print(f"\nThe first prompt:\n{verdict.table}", soft_wrap=True)
    if verdict.models:
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("model", "loaded", "prompts", "tokens in", "out", "mean", "text only"):
            table.add_column(name, justify="left" if name == "model" else "right")
        for count in verdict.models:
            each = max(count.prompts, 1)
            tokens = (f"{n / each:.1f}" for n in (count.before, count.after, count.mean))
            table.add_row(
                f"{count.model}\n{count.method}", str(count.loaded), str(count.prompts), *tokens,
                str(count.text),
            )  # fmt: skip
        shown.print(table)
    for note in verdict.notes:
        shown.print(f"Note: {note}", soft_wrap=True)
    for problem in verdict.problems:
        shown.print(f"NOT COMPRESSED: {problem}", soft_wrap=True)
