"""``tokprune tune``: search for better settings than the published ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tokprune.cli.app import BadInput, app
from tokprune.cli.console import console
from tokprune.cli.model import quiet
from tokprune.cli.values import (
    Device,
    Dtype,
    TrustRemoteCode,
    parse_keep,
    parse_list,
    parse_seconds,
)


@app.command()
def tune(
    model: Annotated[str, typer.Option(help="Model folder, hub name, or 'mini'.")],
    out: Annotated[Path, typer.Option(help="Folder of the study; gone on with if it exists.")],
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Budgets separated by commas: visual tokens on the mean over the decoder layers, "
            "counts (64) or shares (1/9)."
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(help="Budgets of time per answer, separated by commas: 120ms or 0.12s."),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Settings to try at each budget, beside the published ones.")
    ] = 50,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods that may be used, separated by commas. Default: all."),
    ] = None,
    benchmark: Annotated[
        str, typer.Option(help="'mini', 'mini-video', or a file of questions, as for 'sweep'.")
    ] = "mini",
    split: Annotated[
        str | None, typer.Option(help="Split to choose by. Default: validation, else the first.")
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Split to report on, or the share of the images to put aside (1/2). Default: "
            "test, else the next, else 1/2."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Most questions to choose by, balanced over the tasks."),
    ] = None,
    held_out_limit: Annotated[
        int | None, typer.Option(min=1, help="Most questions to report on.")
    ] = None,
    rivals: Annotated[
        int, typer.Option(min=1, help="Published settings that the tuned one has to beat, each.")
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    images: Annotated[Path | None, typer.Option(help="Folder of the images of a file.")] = None,
    scoring: Annotated[
        str | None, typer.Option(help="Rule of scores for a file, as for 'sweep'.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="auto: as the checkpoint says.")] = None,
    device: Annotated[Device | None, typer.Option(help="Where to run.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Questions answered together. Default: 16.")
    ] = None,
    no_latency: Annotated[
        bool, typer.Option("--no-latency", help="Without timing what is reported.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Throw away what the folder holds.")
    ] = False,
) -> None:
    """Search methods, options, schedules and compositions for the most accurate setting at every
    budget, and report it on questions that the search never saw, beside the best published
    settings. A study that was stopped goes on where it was."""
    from tokprune.eval.extra import NEEDED, check_extra

    try:
        check_extra("tuned settings", (*NEEDED, "optuna"), "tune")
    except ImportError as error:
        raise BadInput(str(error)) from None
    budgets = parse_list("tokens", tokens) or []
    for text in budgets:
        parse_keep(text, "--tokens", schedule=False)
    times = [parse_seconds(text, "--latency") for text in parse_list("latency", latency) or []]
    if not budgets and not times:
        raise BadInput("give at least one budget: --tokens 64 or --latency 120ms")
    if times and no_latency:
        raise BadInput("--no-latency leaves no time to hold against --latency; drop one of them")
    given: dict[str, Any] = {
        "images": None if images is None else str(images), "scoring": scoring,
        "dtype": None if dtype is None else dtype.value,
        "device": None if device is None else device.value,
        "trust_remote_code": trust_remote_code or None, "batch_size": batch_size,
        "latency": False if no_latency else None,
    }  # fmt: skip
    from tokprune.eval.sweep.progress import progress_for
    from tokprune.eval.tune.run import run_tune
    from tokprune.eval.tune.settings import TuneSettings
    from tokprune.eval.tune.show import table

    settings = TuneSettings(
        model=model, out=str(out), tokens=tuple(budgets), latency=tuple(times), trials=trials,
        methods=tuple(parse_list("methods", methods) or ()), benchmark=benchmark, split=split,
        held_out=_held_out(held_out), limit=limit, held_out_limit=held_out_limit, rivals=rivals,
        seed=seed, fresh=fresh, sweep={k: v for k, v in given.items() if v is not None},
    )  # fmt: skip
    quiet()
    progress = progress_for(sys.stderr)
    try:
        tuned = run_tune(settings, command=["tokprune", *sys.argv[1:]], progress=progress)
    except KeyboardInterrupt:
        progress.say("Interrupted. Run the same command again to go on.")
        raise
    console(160).print(table(tuned))
    print(f"\n{tuned.verdict}\nreport: {tuned.folder / 'tune.md'}")
    for path in tuned.settings.values():
        print(f"setting: {path}")


def _held_out(text: str | None) -> str | float | None:
    """A share where it looks like one, else the name of a split."""
    if text is None or not any(mark in text for mark in "/.%"):
        return text
    value = parse_keep(text, "--held-out", schedule=False)
    if not isinstance(value, float) or value >= 1:
        raise BadInput(f"--held-out {text!r} should be a split, or a share below 1, such as 1/2")
    return value
