"""``tokprune sweep``: methods × budgets on a benchmark."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tokprune.cli.app import BadInput, app
from tokprune.cli.model import quiet
from tokprune.cli.values import (
    Device,
    Dtype,
    TrustRemoteCode,
    parse_keep,
    parse_list,
    parse_numbers,
)

_Many = list[str] | None
#: exit code of a sweep with a trial that is no result
NO_RESULT = 3


@app.command()
def sweep(
    model: Annotated[str | None, typer.Option(help="Model folder, hub name, or 'mini'.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; resumed if it exists.")] = None,
    methods: Annotated[
        _Many,
        typer.Option(
            help="Names separated by commas, with options as name:option=value; repeatable. "
            "Default: every method for images, or for videos."
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Budgets separated by commas: counts (64) or shares (1/4, 0.25, 25%) of the "
            "visual tokens. Default: 1/2,1/4,1/9,1/16,1/36."
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            "--benchmark",
            "--task",
            help="'mini', 'mini-video' (for models that take videos), or a .jsonl, .parquet, .json "
            "or .tsv file of questions.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the images of a file; images outside are refused ('/' allows all). "
            "Default: the file's own folder."
        ),
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Second file, where the file of questions has no answers.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="How a file is read: llava, vqa, vlmevalkit, scienceqa, docvqa, infovqa, chartqa, "
            "ocrbench, mme, table or tokprune. Default: by its columns."
        ),
    ] = None,
    scoring: Annotated[
        str | None,
        typer.Option(
            help="Rule of scores for a file: exact, vqa, anls, relaxed, letter, yes-no, pope, mme "
            "or contains. Default: by its shape."
        ),
    ] = None,
    prompt_suffix: Annotated[
        str | None, typer.Option(help="Text put after every question of a file.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Question types separated by commas. Default: all. With --harness lmms-eval: its "
            "tasks, groups or tags, which have to be named."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the benchmark.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most questions, balanced over the tasks; with --harness lmms-eval: of each task.",
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="For methods that draw, separated by commas. Default: 0,1,2.")
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            help="What hits the budget: 'mean' of the visual tokens over the decoder layers "
            "(default), or the tokens after the 'last' pruning."
        ),
    ] = None,
    option: Annotated[
        _Many, typer.Option(help="Method option, todre.select=k_center; repeatable.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML or TOML file of settings; options go before it.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="auto: as the checkpoint says.")] = None,
    device: Annotated[Device | None, typer.Option(help="Where to run.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Questions answered together. Default: 16, with --harness lmms-eval 1."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer. Default: as the benchmark says.")
    ] = None,
    variants: Annotated[
        bool, typer.Option("--variants", help="Published variants of the methods as well.")
    ] = False,
    no_controls: Annotated[
        bool,
        typer.Option(
            "--no-controls", help="Without blind, reduced input and yardsticks such as random."
        ),
    ] = False,
    no_noise: Annotated[bool, typer.Option("--no-noise", help="Without the noise floor.")] = False,
    no_latency: Annotated[
        bool, typer.Option("--no-latency", help="Without timing at the end.")
    ] = False,
    no_share: Annotated[
        bool, typer.Option("--no-share", help="Run the encoder anew for every trial.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Throw away what the run folder holds.")
    ] = False,
    parquet: Annotated[
        Path | None, typer.Option(help="Write the rows to this file as well.")
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(
            help="Where answers are made: in this process ('local', the default), or on the "
            "machines of a Ray cluster ('ray')."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="ray: host:port of the cluster, or 'local' for this machine alone. Default: "
            "RAY_ADDRESS, or the cluster that this machine is in."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="ray: most workers, with one model each. Default: all that fit."),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(help="Who asks: tokprune itself (builtin), or lmms-eval with its tasks."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="lmms-eval: id of its model to prune in. Default: by the model's class."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="lmms-eval: data-parallel processes, by accelerate launch. Default: 1."
        ),
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(help="lmms-eval: further arguments of accelerate launch, in one text."),
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(
            help="lmms-eval: words before accelerate launch that start it on every node, in one "
            "text: 'srun --nodes 2 --ntasks-per-node 1'."
        ),
    ] = None,
    include_path: Annotated[
        _Many, typer.Option(help="lmms-eval: folder with further tasks; repeatable.")
    ] = None,
    model_args: Annotated[
        _Many, typer.Option(help="lmms-eval: argument of its model, name=value; repeatable.")
    ] = None,
) -> None:
    """Answer a benchmark with every method at every budget, next to the unpruned model and simple
    controls. Results go to a run folder; a run that was stopped goes on where it was. The exit code
    is 3 where a method cannot be seen to have acted (NOT A RESULT)."""
    options: dict[str, Any] = {
        "model": model, "out": None if out is None else str(out), "benchmark": benchmark,
        "images": None if images is None else str(images),
        "answers": None if answers is None else str(answers),
        "shape": shape, "scoring": scoring, "prompt_suffix": prompt_suffix,
        "methods": parse_list("methods", ",".join(methods) if methods else None),
        "keep": parse_list("keep", keep), "tasks": parse_list("tasks", tasks),
        "split": split, "limit": limit, "seeds": parse_numbers("seeds", seeds), "match": match,
        "dtype": None if dtype is None else dtype.value,
        "device": None if device is None else device.value, "batch_size": batch_size,
        "trust_remote_code": trust_remote_code or None,
        "max_new_tokens": max_new_tokens, "variants": variants or None,
        "controls": False if no_controls else None,
        "noise": False if no_noise else None, "latency": False if no_latency else None,
        "share": False if no_share else None, "fresh": fresh or None,
        "executor": executor, "address": address, "workers": workers,
        "harness": harness, "base": base,
        "processes": processes, "launch": launch, "launcher": launcher,
        "include_path": include_path or None, "model_args": model_args or None,
    }  # fmt: skip
    for text in options["keep"] or ():
        parse_keep(text, schedule=False)  # names the option, which the settings do not know
    from tokprune.eval.sweep.settings import make_settings, read_table, with_options

    table = {} if config is None else read_table(config)
    table |= {name: value for name, value in options.items() if value is not None}
    for name in ("model", "out"):
        if name not in table:
            raise BadInput(f"--{name} is missing")
    if option:
        listed = table.get("methods", [])
        table["methods"] = with_options([listed] if isinstance(listed, str) else listed, option)
    settings = make_settings(table, "options" if config is None else str(config))
    if parquet is not None and not parquet.absolute().parent.is_dir():
        raise BadInput(f"--parquet {parquet}: no such folder")
    from tokprune.eval.sweep.harness import TrialsFailedError

    try:
        run = _run(settings)
    except TrialsFailedError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if parquet is not None:
        run.to_parquet(parquet)
    failed = sum(row["status"] == "failed" for row in run.rows)
    print(
        f"{run.folder}: {len(run.rows)} answers in {len(run.trials)} trials"
        + (f", {failed} failed" if failed else "")
    )
    wrong = [gate for gate in run.gates().values() if gate.outcome == "fail"]
    for gate in wrong:
        print(f"NOT A RESULT: {gate.trial}: {gate.reason}", file=sys.stderr)
    if wrong:
        raise typer.Exit(NO_RESULT)


def _run(settings: Any) -> Any:
    import warnings

    from tokprune.eval.extra import check_extra
    from tokprune.eval.sweep.progress import progress_for
    from tokprune.eval.sweep.runner import run_sweep

    try:
        check_extra("sweeps")
    except ImportError as error:
        raise BadInput(str(error)) from None
    quiet()
    progress = progress_for(sys.stderr)
    command = ["tokprune", *sys.argv[1:]]
    with warnings.catch_warnings():
        show = warnings.showwarning

        def say(message: Any, category: Any, *rest: Any, **more: Any) -> None:
            if category is UserWarning:
                progress.say(f"Warning: {message}")
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = say
        try:
            return run_sweep(settings, command=command, progress=progress)
        except KeyboardInterrupt:
            progress.say("Interrupted. Run the same command again to go on.")
            raise
