"""``tokprune reproduce``: published figures and ours, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tokprune.cli.app import BadInput, app
from tokprune.cli.console import console
from tokprune.cli.values import Device, Dtype, parse_list

_Many = list[str] | None


class Format(str, Enum):
    table, markdown, json = "table", "markdown", "json"


@app.command()
def reproduce(
    paper: Annotated[
        _Many, typer.Option(help="Paper of the ledger, for example todre; repeatable.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub name; picks its published rows.")
    ] = None,
    as_model: Annotated[
        str | None,
        typer.Option("--as", help="The published model it is, where its name does not tell."),
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Benchmarks or lmms-eval tasks, separated by commas.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Budgets as printed, or in tokens, separated by commas.")
    ] = None,
    run: Annotated[
        list[Path] | None, typer.Option(help="Finished run folder to read; repeatable.")
    ] = None,
    execute: Annotated[
        bool, typer.Option("--execute", help="Run the rows that can be run; needs --out.")
    ] = False,
    harness: Annotated[
        str, typer.Option(help="Who asks with --execute: builtin, or lmms-eval.")
    ] = "builtin",
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="Questions for the builtin harness: a file whose tasks are named as the ledger's "
            "benchmarks. How it is read (images, answers, shape, scoring): in --config."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most questions, balanced over the tasks.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Questions answered together.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="auto: as the checkpoint says.")] = None,
    device: Annotated[Device | None, typer.Option(help="Where to run.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML or TOML file of further settings of the sweeps; options go before it."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for reproduce.md, reproduce.json and the runs of --execute."),
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="What to print.")] = Format.table,
    ledger: Annotated[
        Path | None, typer.Option(help="Folder of ledger files instead of the shipped ones.")
    ] = None,
) -> None:
    """Compare published figures with ours: published, ours, gap and tolerance; rows that were not
    run say why. Without options: the papers of the ledger."""  # fmt: skip
    from tokprune.eval.published import model_key
    from tokprune.eval.published.ledger import FOLDER

    folder = FOLDER if ledger is None else ledger
    if not folder.is_dir():
        raise BadInput(f"--ledger {folder}: no such folder")
    if not any((paper, model, as_model, methods, tasks, keep, run, execute)):
        _list_papers(folder, form)
        return
    if execute and (model is None or out is None):
        raise BadInput(f"--execute needs --{'model' if model is None else 'out'}")
    if not execute and (benchmark is not None or config is not None):
        raise BadInput(f"--{'config' if benchmark is None else 'benchmark'} is for --execute")
    from tokprune.eval.published.reproduce import compare, read_figures, select, show

    named = as_model if as_model is not None else model
    if named is None and run:  # the rows of the run's own model
        named = read_figures(run[0]).model
    rows = select(
        parse_list("paper", None if paper is None else ",".join(paper)), model=named,
        methods=parse_list("methods", methods), tasks=parse_list("tasks", tasks),
        keep=parse_list("keep", keep), ledger=folder,
    )  # fmt: skip
    published = None if as_model is None else model_key(as_model)
    runs = [read_figures(path, published) for path in run or []]
    reasons: dict[tuple[Any, ...], str] = {}
    folders: list[Path] = []
    if execute:
        assert model is not None
        assert out is not None
        options = {
            "limit": limit, "dtype": None if dtype is None else dtype.value,
            "device": None if device is None else device.value,
            "max_new_tokens": max_new_tokens, "batch_size": batch_size,
        }  # fmt: skip
        folders, reasons = _execute(rows, model, out, harness, benchmark, config, options)
        runs += [read_figures(path, model_key(named or model)) for path in folders]
    compared = compare(rows, runs, reasons)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "reproduce.md").write_text(show.markdown(compared), encoding="utf-8")
        (out / "reproduce.json").write_text(show.as_json(compared) + "\n", encoding="utf-8")
    if form is Format.json:
        print(show.as_json(compared))
    elif form is Format.markdown:
        print(show.markdown(compared))
    else:
        _print(compared)
    if execute and not folders:
        raise typer.Exit(1)  # the table says why nothing was run


def _execute(
    rows: Sequence[Any], model: str, out: Path, harness: str, benchmark: str | None,
    config: Path | None, options: dict[str, Any],
) -> Any:  # fmt: skip
    from tokprune.cli.sweep import _run
    from tokprune.eval.published.reproduce import execute
    from tokprune.eval.sweep.settings import read_table

    table = {} if config is None else read_table(config)
    table |= {name: value for name, value in options.items() if value is not None}
    return execute(rows, model, out, _run, harness=harness, benchmark=benchmark, **table)


def _list_papers(folder: Path, form: Format) -> None:
    """What the ledger holds."""
    import json

    from tokprune.eval.published import load_paper, papers

    entries: list[dict[str, Any]] = []
    for key in papers(folder):
        rows = load_paper(key, folder)
        entries.append({
            "paper": key, "title": rows[0].paper.title, "arxiv": rows[0].paper.arxiv,
            "rows": len(rows), "models": sorted({row.model for row in rows}),
            "methods": sorted({row.method for row in rows} - {"none"}),
        })  # fmt: skip
    if form is Format.json:
        print(json.dumps(entries, indent=1, ensure_ascii=False))
        return
    header = ("paper", "rows", "models", "methods", "title")
    cells = [
        [e["paper"], str(e["rows"]), ", ".join(e["models"]), ", ".join(e["methods"]),
         e["title"] + (f", arXiv {e['arxiv']}" if e["arxiv"] else "")]
        for e in entries
    ]  # fmt: skip
    if form is Format.markdown:
        print("\n".join(f"| {' | '.join(c)} |" for c in [header, ["---"] * len(header), *cells]))
        return
    _show(header, cells, frozenset({0, 2, 3, 4}))


def _print(compared: Sequence[Any]) -> None:
    """The table without columns that hold nothing or the same in every row, and what they hold."""
    from tokprune.eval.published.reproduce import show

    cells = show.table(compared)
    numbers: dict[str, int] = {}
    for row in cells:  # long texts stand below the table
        if row[-1]:
            row[-1] = str(numbers.setdefault(row[-1], len(numbers) + 1))
    shared = [len({row[n] for row in cells}) == 1 and n < 3 for n in range(len(show.HEADER))]
    empty = [not any(row[n] for row in cells) for n in range(len(show.HEADER))]
    shown = [n for n in range(len(show.HEADER)) if not shared[n] and not empty[n]]
    title = ", ".join(cells[0][n] for n in range(3) if shared[n])
    words = frozenset(i for i, n in enumerate(shown) if n in show.WORDS)
    _show([show.HEADER[n] for n in shown], [[row[n] for n in shown] for row in cells], words, title)
    for text, number in numbers.items():
        print(f"{number:>3}: {text}")
    print(f"\n{show.summary(compared)}.\n{show.NOTES}")


def _show(
    header: Sequence[str], rows: Sequence[Sequence[str]], words: frozenset[int], title: str = ""
) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
    for n, name in enumerate(header):
        table.add_column(name, justify="left" if n in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console(200).print(table)
