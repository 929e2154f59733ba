"""``tokprune bench``: what a method costs and saves on this machine."""

from __future__ import annotations

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tokprune.cli.app import BadInput, app
from tokprune.cli.values import Device, Dtype, parse_keep


class Clock(str, Enum):
    wall, cpu = "wall", "cpu"


@app.command()
def bench(
    methods: Annotated[str, typer.Option(help="Method names, separated by commas.")],
    keep: Annotated[
        str, typer.Option(help="Visual tokens per image, counts or fractions: 64,192 or 0.11.")
    ],
    model: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(
            help="Instead of a model: a published shape with random weights: tiny, small, "
            "llava-1.5-7b, llava-1.5-13b, llava-next-7b."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Measurements of everything.")] = 20,
    new_tokens: Annotated[int, typer.Option(help="Length of an answer.")] = 16,
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes of the grid.")] = "1,4",
    text_tokens: Annotated[
        str, typer.Option(help="Text lengths of the grid, the picture's tokens come on top.")
    ] = "32,256",
    image: Annotated[Path | None, typer.Option(help="Picture (default: made in code).")] = None,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.auto,
    dtype: Annotated[
        Dtype,
        typer.Option(help="auto: as the checkpoint says; random weights: bfloat16 on CUDA."),
    ] = Dtype.auto,
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
    names = _items(methods, "--methods")
    keeps = [_budget(text) for text in _items(keep, "--keep")]
    sizes, lengths = _counts(batch_sizes, "--batch-sizes"), _counts(text_tokens, "--text-tokens")
    for option, value in (("--rounds", rounds), ("--new-tokens", new_tokens)):
        if value < 1:
            raise BadInput(f"{option} {value} should be at least 1")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise BadInput(f"--json {json_file}: no such folder")
    if json_file is not None and json_file.is_dir():
        raise BadInput(f"--json {json_file} is a folder; it should be a file")
    picture = None if image is None else _open(image)
    _needs("scipy", "psutil", "numpy")

    import torch
    import transformers

    from tokprune.bench.run import bench as run
    from tokprune.bench.run import cells_of
    from tokprune.bench.table import tables
    from tokprune.engine.masks import check_backend

    check_backend(attention, "model")
    if device is Device.cuda and not torch.cuda.is_available():
        raise BadInput("--device cuda: no CUDA device is available")
    place = device.value
    if device is Device.auto:
        place = "cuda" if torch.cuda.is_available() else "cpu"
    if clock is Clock.cpu and place != "cpu":
        raise BadInput("--clock cpu sees no work of a GPU; use wall")
    try:
        cells_of(names, keeps, 32)  # names and budgets, before any model is there
    except TypeError as error:
        raise BadInput(str(error)) from None
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    if random_weights is not None:
        loaded, processor = _random(random_weights, names, keeps, place, dtype, attention), None
    else:
        assert model is not None
        loaded, processor = _load(model, place, dtype, attention)
    with _progress() as progress:
        result = run(
            loaded,
            names,
            keeps,
            processor=processor,
            image=picture,
            rounds=rounds,
            new_tokens=new_tokens,
            batch_sizes=sizes,
            text_tokens=lengths,
            clock=clock.value,
            name=model if random_weights is None else f"random weights {random_weights}",
            progress=progress,
        )
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    for part in tables(result):
        console.print(part, highlight=False, markup=False)
    if json_file is not None:
        _write(json_file, result)


def _items(text: str, option: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise BadInput(f"{option} {text!r} should be a list separated by commas, without gaps")
    return items


def _budget(text: str) -> Any:
    value = parse_keep(text)
    if value <= 0 or (isinstance(value, float) and not value <= 1):
        raise BadInput(f"--keep {text} should be a count of at least 1 or a fraction in (0, 1]")
    return value


def _counts(text: str, option: str) -> list[int]:
    items = _items(text, option)
    if not all(item.isdecimal() and int(item) > 0 for item in items):
        raise BadInput(f"{option} {text!r} should be whole numbers, at least 1: 1,4")
    return [int(item) for item in items]


def _needs(*packages: str) -> None:
    """Refuse early where the extra is not installed."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise BadInput(f"bench needs {', '.join(missing)}; pip install 'tokprune[sweep]'")


def _open(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise BadInput(f"--image {path}: no such file")
    try:
        return Image.open(path).convert("RGB")
    except UnidentifiedImageError:
        raise BadInput(f"--image {path}: not a picture that Pillow can read") from None


def _random(
    name: str, names: list[str], keeps: list[Any], place: str, dtype: Dtype, attention: str
) -> Any:
    import torch

    from tokprune.bench.models import random_model, skeleton
    from tokprune.bench.run import cells_of
    from tokprune.families import family_of

    bare = skeleton(name)
    family = family_of(bare)
    facts = family.facts(bare, family.parts(bare))
    for cell in cells_of(names, keeps, facts.decoder_layers):
        cell.method.plan(facts)
    kind = dtype.value
    if dtype is Dtype.auto:
        kind = "bfloat16" if place == "cuda" else "float32"
    try:
        return random_model(name, dtype=getattr(torch, kind), device=place, attention=attention)
    except MemoryError as error:
        raise BadInput(str(error)) from None


def _load(path: str, place: str, dtype: Dtype, attention: str) -> tuple[Any, Any]:
    from tokprune.loading import load

    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise BadInput(f"--model {path}: no such folder")
    model, processor = load(path, processor=True, dtype=dtype.value, attn_implementation=attention)
    return model.to(place).eval(), processor


class _progress:
    """A bar on stderr where a person sees it, else nothing."""

    def __enter__(self) -> Any:
        self.bar: Any = None
        if not sys.stderr.isatty():
            return None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(),
            TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.bar.start()
        task = self.bar.add_task("", total=None)

        def show(what: str, done: int, rounds: int) -> None:
            self.bar.update(task, description=what, completed=done, total=rounds)

        return show

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()


def _write(path: Path, result: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
