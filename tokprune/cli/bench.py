"""``tokprune bench``: what a method costs and saves on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tokprune.cli.app import BadInput, app
from tokprune.cli.console import console
from tokprune.cli.model import load_model, place_of, quiet
from tokprune.cli.values import (
    Device,
    Dtype,
    TrustRemoteCode,
    parse_keep,
    parse_list,
    parse_numbers,
)
from tokprune.cli.visuals import named, open_image


class Clock(str, Enum):
    wall, cpu = "wall", "cpu"


@app.command()
def bench(
    methods: Annotated[str, typer.Option(help="Method names, separated by commas.")],
    keep: Annotated[
        str,
        typer.Option(
            help="Budgets separated by commas: counts (64) or shares (1/4, 0.25, 25%) of the "
            "visual tokens."
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(
            help="Instead of a model: a published shape with random weights: tiny, small, "
            "llava-1.5-7b, llava-1.5-13b, llava-next-7b, qwen2.5-vl-7b, qwen2.5-vl-7b-1792px, "
            "qwen3-vl-8b, internvl3-8b, gemma3-4b; qwen2.5-vl-7b-video, qwen3-vl-8b-video (16,384 "
            "tokens)."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Measurements of everything.")] = 20,
    new_tokens: Annotated[
        str, typer.Option(help="Length of an answer, or lengths, separated by commas.")
    ] = "16",
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes of the grid.")] = "1,4",
    text_tokens: Annotated[
        str, typer.Option(help="Text lengths of the grid, the image's tokens come on top.")
    ] = "32,256",
    image: Annotated[
        str | None, typer.Option(metavar="PATH", help="Image (default: made in code).")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.auto,
    dtype: Annotated[
        Dtype,
        typer.Option(help="auto: as the checkpoint says; random weights: bfloat16 on CUDA."),
    ] = Dtype.auto,
    trust_remote_code: TrustRemoteCode = False,
    attention: Annotated[str, typer.Option(help="Attention backend: sdpa, eager, …")] = "sdpa",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    clock: Annotated[
        Clock, typer.Option(help="cpu: time of this process, on a machine that others use too.")
    ] = Clock.wall,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything to this file.")
    ] = None,
) -> None:
    """Time methods against no compression and against the ideal: the same model on as many tokens
    with no method work."""
    if (model is None) == (random_weights is None):
        raise BadInput("give one of --model and --random-weights")
    names = parse_list("methods", methods) or []
    keeps = [parse_keep(text, schedule=False) for text in parse_list("keep", keep) or []]
    sizes = parse_numbers("batch-sizes", batch_sizes, 1) or []
    lengths = parse_numbers("text-tokens", text_tokens, 1) or []
    if rounds < 1:
        raise BadInput(f"--rounds {rounds} should be at least 1")
    if new_tokens.strip() == "0":
        raise BadInput("--new-tokens 0 should be at least 1")
    answers = parse_numbers("new-tokens", new_tokens, 1) or []
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise BadInput(f"--json {json_file}: no such folder")
    if json_file is not None and json_file.is_dir():
        raise BadInput(f"--json {json_file} is a folder; it should be a file")
    opened = None if image is None else open_image(image)
    frames = 0
    if importlib.util.find_spec("psutil") is None:
        raise BadInput("bench needs psutil, which is not installed: pip install 'tokprune[sweep]'")

    import torch

    from tokprune.bench.run import bench as run
    from tokprune.bench.run import trials_of
    from tokprune.bench.table import tables
    from tokprune.engine.masks import check_backend
    from tokprune.eval.sweep.progress import Bar, Progress
    from tokprune.inputs.pixel_limits import check_shape

    check_backend(attention, "model")
    place = place_of(device)
    if clock is Clock.cpu and place != "cpu":
        raise BadInput("--clock cpu sees no work of a GPU; use wall")
    try:
        trials_of(names, keeps, 32)  # names and budgets, before any model is there
    except TypeError as error:
        raise BadInput(str(error)) from None
    if threads is not None:
        torch.set_num_threads(threads)
    quiet()
    if random_weights is not None:
        from tokprune.bench.models import frames_of, image_of

        loaded, processor = _random(random_weights, names, keeps, place, dtype, attention), None
        opened = image_of(random_weights) if opened is None else opened
        frames = frames_of(random_weights)
    else:
        assert model is not None
        loaded, processor = load_model(
            model, place, dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
        if image is not None and opened is not None:
            check_shape(processor, opened, named("--image", image))
    with Bar() if sys.stderr.isatty() else Progress() as progress:
        result = run(
            loaded,
            names,
            keeps,
            processor=processor,
            image=opened,
            rounds=rounds,
            new_tokens=answers,
            batch_sizes=sizes,
            text_tokens=lengths,
            clock=clock.value,
            name=model if random_weights is None else f"random weights {random_weights}",
            progress=_shown_by(progress),
            frames=frames,
        )
    out = console(100)
    for part in tables(result):
        out.print(part)
    if json_file is not None:
        _write(json_file, result)


def _random(
    name: str, names: list[str], keeps: list[Any], place: str, dtype: Dtype, attention: str
) -> Any:
    import torch

    from tokprune.bench.models import random_model, skeleton
    from tokprune.bench.run import trials_of
    from tokprune.families import family_of

    bare = skeleton(name)
    family = family_of(bare)
    facts = family.facts(bare, family.parts(bare))
    for trial in trials_of(names, keeps, facts.decoder_layers):
        trial.method.on(facts).plan(facts)
    kind = dtype.value
    if dtype is Dtype.auto:
        kind = "bfloat16" if place == "cuda" else "float32"
    try:
        return random_model(name, dtype=getattr(torch, kind), device=place, attention=attention)
    except MemoryError as error:
        raise BadInput(str(error)) from None


def _shown_by(progress: Any) -> Any:
    """A callback of the bench, (what, rounds done, rounds), that moves a bar."""
    stage, shown = None, 0

    def show(what: str, done: int, rounds: int) -> None:
        nonlocal stage, shown
        if what != stage:
            progress.start(what, rounds)
            stage, shown = what, 0
        progress.advance(done - shown)
        shown = done

    return show


def _write(path: Path, result: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
