"""The command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import ast
import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tokprune import __version__


class BadInput(Exception):
    """Something the user gave cannot be used; the message is the whole report."""


class _App(typer.Typer):
    """Reports bad input as one line on stderr and exit code 2."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            code = super().__call__(*args, **{**kwargs, "standalone_mode": False})
        except (KeyboardInterrupt, typer.Abort):
            print("Aborted.", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if not _is_bad_input(error):
                raise
            text = error.format_message() if hasattr(error, "format_message") else str(error)
            first = next((x.strip() for x in text.splitlines() if x.strip()), "")
            print(f"Error: {first or type(error).__name__}", file=sys.stderr)
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)


def _is_bad_input(error: Exception) -> bool:
    if isinstance(error, (BadInput, ValueError, OSError)):
        return True
    # click's usage errors, whichever click typer brings; ours (all of them say what to do)
    return hasattr(error, "format_message") or type(error).__module__ == "tokprune.errors"


app = _App(
    name="tokprune",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tokprune {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Prune and merge the visual tokens of vision-language models, without training."""


# --------------------------------------------------------------------------- methods


@app.command()
def methods(
    pattern: Annotated[str, typer.Argument(help="Only names that match, e.g. 'vision*'.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods: where they act, what they read, published budgets, paper."""
    import fnmatch

    from tokprune.methods import available_methods

    found = {n: c for n, c in available_methods().items() if fnmatch.fnmatch(n, pattern.lower())}
    if not found:
        raise BadInput(f"no method matches {pattern!r}; known: {', '.join(available_methods())}")
    if as_json:
        print(json.dumps([_describe(cls) for cls in found.values()], indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("name", "stages", "needs", "published budgets", "paper"):
        table.add_column(name, no_wrap=name == "name", overflow="fold")
    for cls in found.values():
        budgets: dict[str, list[str]] = {}
        for preset in cls.presets:
            own = budgets.setdefault(preset.model, [])
            if str(preset.budget) not in own:
                own.append(str(preset.budget))
        table.add_row(
            cls.name,
            ", ".join(cls.stages),
            cls.needs,
            "\n".join(f"{model}: {', '.join(values)}" for model, values in budgets.items()),
            cls.paper,
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def _describe(cls: Any) -> dict[str, Any]:
    import dataclasses

    return {
        "name": cls.name,
        "class": cls.__name__,
        "stages": list(cls.stages),
        "needs": cls.needs,
        "paper": cls.paper,
        "options": {
            f.name: None if f.default is dataclasses.MISSING else f.default
            for f in dataclasses.fields(cls)
            if f.init
        },
        "presets": [dataclasses.asdict(p) for p in cls.presets],
    }


# ------------------------------------------------------------------------------- run


class Device(str, Enum):
    auto, cpu, cuda = "auto", "cpu", "cuda"


class Dtype(str, Enum):
    auto, float32, bfloat16, float16 = "auto", "float32", "bfloat16", "float16"


@app.command()
def run(
    model: Annotated[str, typer.Option(help="Model folder or hub name.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[list[Path] | None, typer.Option(help="Picture; repeat for several.")] = None,
    method: Annotated[str | None, typer.Option(help="See 'tokprune methods'.")] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Visual tokens per image: 64, 0.11, or a schedule 0.875,0.625,0.125."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Method option name=value; repeat for several.")
    ] = None,
    overlay: Annotated[Path | None, typer.Option(help="Save a picture of what was kept.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.auto,
    dtype: Annotated[Dtype, typer.Option(help="auto: as the checkpoint says.")] = Dtype.auto,
    compare: Annotated[bool, typer.Option("--compare", help="Answer without pruning too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Answer a prompt about pictures with a compressed model, and show what was removed."""
    options = parse_options(option or [])
    if keep is not None:
        if "keep" in options:
            raise BadInput("give the budget once: --keep or --option keep=…")
        options["keep"] = parse_keep(keep)
    if method is None and (options or overlay or compare):
        given = "--keep/--option" if options else "--overlay" if overlay else "--compare"
        raise BadInput(f"{given} needs --method; see 'tokprune methods'")
    if overlay is not None:
        if not image:
            raise BadInput("--overlay needs an --image to draw on")
        _check_target(overlay)
    pictures = [_open(path) for path in image or []]
    from tokprune.methods import make_method

    try:
        made = None if method is None else make_method(method, **options)
    except TypeError as error:  # an option of the wrong type
        raise BadInput(str(error)) from None
    from tokprune.patching import patch, unpatch

    loaded, processor = _load(model, made, device, dtype)
    result: dict[str, Any] = {"method": None if made is None else repr(made)}
    inputs = _inputs(processor, prompt, pictures).to(loaded.device)
    if compare and made is not None:
        unpatch(loaded)
        result["answer_unpruned"] = _answer(loaded, processor, inputs, max_new_tokens)
    trace = None if made is None else patch(loaded, made)
    result["answer"] = _answer(loaded, processor, inputs, max_new_tokens)
    if overlay is not None and trace is not None:
        from tokprune.overlay import overlay as draw

        draw(trace, pictures, overlay, processor=processor)
        result["overlay"] = str(overlay)
    if as_json:
        result["trace"] = None if trace is None else trace.to_dict()
        print(json.dumps(result))
        return
    if "answer_unpruned" in result:
        print(f"unpruned: {result['answer_unpruned']}\npruned:   {result['answer']}")
    else:
        print(result["answer"])
    if trace is not None:
        print(f"\n{trace.summary()}")
    if overlay is not None:
        print(f"\nkept patches: {overlay}")


def parse_keep(text: str) -> Any:
    """``64`` → 64, ``0.11`` → 0.11, ``0.875,0.625,0.125`` → a tuple of these."""
    try:
        parts = [int(p) if p.lstrip("+-").isdigit() else float(p)
                 for p in (part.strip() for part in text.split(","))]  # fmt: skip
    except ValueError:
        raise BadInput(
            f"--keep {text!r} should be a count (64), a fraction (0.11) or a schedule of these "
            "(0.875,0.625,0.125)"
        ) from None
    return parts[0] if len(parts) == 1 else tuple(parts)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; values are Python literals, anything else is text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise BadInput(f"--option {pair!r} should be name=value")
        if name in options:
            raise BadInput(f"--option {name} is given twice")
        try:
            options[name] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            options[name] = text.strip()
    return options


def _open(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise BadInput(f"--image {path}: no such file")
    try:
        return Image.open(path).convert("RGB")
    except UnidentifiedImageError:
        raise BadInput(f"--image {path}: not a picture that Pillow can read") from None


def _check_target(path: Path) -> None:
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise BadInput(f"--overlay {path}: unknown picture format; use for example .png")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"--overlay {path}: no such folder")


def _load(path: str, method: Any, device: Device, dtype: Dtype) -> tuple[Any, Any]:
    import torch
    import transformers

    from tokprune.loading import load

    if device is Device.cuda and not torch.cuda.is_available():
        raise BadInput("--device cuda: no CUDA device is available")
    place = device.value
    if device is Device.auto:
        place = "cuda" if torch.cuda.is_available() else "cpu"
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise BadInput(f"--model {path}: no such folder")
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    model, processor = load(path, method, processor=True, dtype=dtype.value)
    return model.to(place), processor


def _inputs(processor: Any, prompt: str, pictures: list[Any]) -> Any:
    """Tokens and pixels; the chat template where the processor has one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    else:
        text = f"USER: {'<image>' * len(pictures)}{chr(10) * bool(pictures)}{prompt} ASSISTANT:"
    return processor(images=pictures or None, text=text, return_tensors="pt")


def _answer(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> str:
    import torch

    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(new, skip_special_tokens=True)).strip()
