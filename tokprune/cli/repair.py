"""``tokprune repair``: a damaged run folder that can be resumed again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokprune.cli.app import app

#: lines that are named
_SHOWN = 10


@app.command()
def repair(
    run: Annotated[Path, typer.Argument(help="Run folder of 'tokprune sweep'.")],
) -> None:
    """Drop from a run folder what cannot be read (corrupt or contradictory rows, broken files), and
    keep a copy of it. The same sweep then asks the missing questions again."""
    from tokprune.eval.sweep.repair import repair as mend

    done = mend(run)
    if not done.backups:
        print(f"{run}: nothing to repair; {done.kept} rows")
        return
    for number, reason in done.dropped[:_SHOWN]:
        print(f"rows.jsonl, line {number}: {reason}")
    if len(done.dropped) > _SHOWN:
        print(f"… and {len(done.dropped) - _SHOWN} more")
    for name, reason in done.files.items():
        print(f"{name}: {reason}")
    what = [f"{len(done.dropped)} rows dropped, {done.kept} kept"] if done.dropped else []
    if done.files:
        what.append(f"{len(done.files)} other files dropped")
    print(f"{run}: {'; '.join(what)}. As it was: {', '.join(b.name for b in done.backups)}")
    print("The same 'tokprune sweep' command asks the missing questions again.")
