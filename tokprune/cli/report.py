"""``tokprune report``: tables, plots and a page from a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokprune.cli.app import BadInput, app
from tokprune.cli.console import console
from tokprune.cli.values import parse_amount


@app.command()
def report(
    run: Annotated[list[Path], typer.Argument(help="Run folder of 'tokprune sweep'.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write; default: report/ in the run folder.")
    ] = None,
    groups_from: Annotated[
        Path | None,
        typer.Option(help="Take the groups A and B from another model's run or group files."),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            help="Budget for pairwise comparisons: tokens (64), or a share (1/4, 0.25, 25%; "
            "default 0.11)."
        ),
    ] = None,
    published: Annotated[
        str | None,
        typer.Option(
            help="Papers of the ledger, separated by commas, or 'all': their figures beside ours "
            "(see 'tokprune reproduce')."
        ),
    ] = None,
    as_model: Annotated[
        str | None,
        typer.Option("--as", help="The published model it is, where its name does not tell."),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Make a page with plots, tables and a gallery from a sweep."""
    if len(run) > 1:
        raise BadInput(
            f"report takes one run folder, got {len(run)}; make a report of each, and use "
            "--groups-from to judge one model on the questions of another"
        )
    budget = parse_amount(at, "--at")
    try:
        from tokprune.eval.report import build_report
    except ImportError as error:
        raise BadInput(str(error)) from None
    if as_model is not None:
        from tokprune.eval.published import MODELS, model_key

        if published is None:
            raise BadInput("--as is for --published")
        as_model = model_key(as_model)
        if as_model not in MODELS:
            raise BadInput(f"--as {as_model} is not in the ledger; it has {', '.join(MODELS)}")
    from tokprune.eval.second_question.section import second_question_section

    further: list[Any] = [second_question_section]
    if published is not None:
        from functools import partial

        from tokprune.eval.published.section import published_section

        papers = [part.strip() for part in published.split(",")]
        further.append(partial(published_section, papers=papers, model=as_model))
    built = build_report(run[0], out, groups_from=groups_from, at=budget, further=further)
    _print(built)
    if show:
        import webbrowser

        webbrowser.open(built.html.resolve().as_uri())


def _print(built: Any) -> None:
    """The points at the main budget, and where the page is."""
    from rich import box
    from rich.table import Table

    from tokprune.eval.report.formatting import percent, probability, signed, with_interval
    from tokprune.eval.report.highlights import highlights, warnings
    from tokprune.eval.report.tables import tokens

    analysis = built.analysis
    table = Table(box=box.SIMPLE_HEAD, title=f"at {analysis.at:g} tokens", title_justify="left")
    for n, name in enumerate(
        ("variant", "tokens", "accuracy, %", "change", "p (Holm)", "loyalty, %")
    ):
        table.add_column(name, justify="right" if n else "left", no_wrap=True)
    for r in [analysis.unpruned, *analysis.at_budget()]:
        table.add_row(
            "unpruned" if r.point.variant == "none" else r.point.variant,
            tokens(r),
            with_interval(r.accuracy, r.interval),
            "" if r.flips is None else signed(-r.drop),
            "" if r.flips is None else probability(r.p),
            percent(r.loyalty),
        )
    out = console(110)
    out.print(table)
    for line in (
        *highlights(analysis, built.differences, built.contest, built.oracles),
        *warnings(analysis),
    ):
        out.print(f"- {line}")
    out.print(f"\n{built.html}", soft_wrap=True)
