"""``tokprune second-question``: another question on the same cache."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tokprune.cli.app import BadInput, app
from tokprune.cli.console import console
from tokprune.cli.model import quiet
from tokprune.cli.values import parse_list

_SHOWN = (
    "trial", "alone, %", "second, %", "carry-over, points [95 %]", "p (Holm)", "reads the question",
    "safe", "pairs",
)  # fmt: skip


class History(str, Enum):
    none, own = "none", "own"


@app.command("second-question")
def second_question(
    run: Annotated[Path, typer.Argument(help="Run folder of 'tokprune sweep'.")],
    trials: Annotated[
        str | None,
        typer.Option(help="Trials of the run, separated by commas (todre@64). Default: all."),
    ] = None,
    pairs: Annotated[
        int, typer.Option(min=1, help="Ordered pairs of questions about one image, at least.")
    ] = 600,
    history: Annotated[
        History,
        typer.Option(
            help="What a second question comes after: the image alone, or the first question and "
            "the unpruned model's own answer, too."
        ),
    ] = History.none,
    seed: Annotated[int, typer.Option(help="Of the draw of images.")] = 0,
) -> None:
    """Compress under one question, ask another one on the same cache: what does that cost, beside
    choosing tokens anew? Answers go to the run folder, where 'tokprune report' finds them; stopped
    and started again, it goes on."""
    try:
        from tokprune.eval.second_question.measures import read_second_questions
        from tokprune.eval.second_question.run import ask_second_questions
        from tokprune.eval.second_question.section import table
        from tokprune.eval.sweep.progress import progress_for
    except ImportError as error:
        raise BadInput(str(error)) from None
    quiet()
    with progress_for(sys.stderr) as progress:
        started = False

        def advance(done: int, total: int) -> None:
            nonlocal started
            if not started:
                progress.start("images", total)
                started = True
            progress.advance(1)

        ask_second_questions(
            run, pairs=pairs, history=history.value, trials=parse_list("trials", trials), seed=seed,
            progress=advance,
        )  # fmt: skip
    found = read_second_questions(run)
    if found is None:
        raise BadInput(f"{run}: nothing was asked")
    from rich import box
    from rich.table import Table

    made, shown = table(found), Table(box=box.SIMPLE_HEAD)
    # the others are in the report
    columns = [n for n, name in enumerate(made.header) if name in _SHOWN]
    for n in columns:
        shown.add_column(made.header[n], justify="left" if n in made.words else "right")
    for row in made.rows:
        # what belongs together stays on a line; the words of the header may break
        shown.add_row(*(row[n].replace(" ", "\u00a0") for n in columns))
    console(130).print(shown)
