"""``tokprune run``: answer one prompt with a compressed model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tokprune.cli.app import BadInput, app
from tokprune.cli.method import Keep, Name, Options, Setting, method_options, named_method
from tokprune.cli.model import load_model, place_of
from tokprune.cli.values import Device, Dtype
from tokprune.cli.visuals import open_image, open_video
from tokprune.inputs.prompts import prompt_text


@app.command()
def run(
    model: Annotated[str, typer.Option(help="'mini' (shipped), a model folder, or a hub name.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image; repeat for several.")] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(
            help="Video, for models that take any: a folder of frames, or an animated image; "
            "repeat for several."
        ),
    ] = None,
    frames: Annotated[
        int, typer.Option(min=1, help="Most frames shown of a video, evenly spaced.")
    ] = 8,
    method: Name = None,
    keep: Keep = None,
    option: Options = None,
    setting: Setting = None,
    overlay: Annotated[Path | None, typer.Option(help="Save an image of what was kept.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.auto,
    dtype: Annotated[Dtype, typer.Option(help="auto: as the checkpoint says.")] = Dtype.auto,
    compare: Annotated[bool, typer.Option("--compare", help="Answer without pruning too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Answer a prompt about images or videos with a compressed model, and show what was
    removed."""
    options = method_options(keep, option)
    if method is None and setting is None and (options or overlay or compare):
        used = "--keep/--option" if options else "--overlay" if overlay else "--compare"
        raise BadInput(f"{used} needs --method or --setting; see 'tokprune methods'")
    if overlay is not None:
        if not image and not video:
            raise BadInput("--overlay needs an --image or a --video to draw on")
        _check_target(overlay)
    images = [open_image(path) for path in image or []]
    clips = [open_video(path, frames) for path in video or []]
    if len({len(clip) for clip in clips}) > 1:
        raise BadInput("--video: all videos of a prompt should have equally many frames")
    chosen = named_method(method, options, setting)
    from tokprune.api import patch, unpatch
    from tokprune.families import bind

    loaded, processor = load_model(model, place_of(device), dtype, chosen)
    if clips and not bind(loaded).facts.videos:
        raise BadInput(f"--video: model {model} takes images only")
    result: dict[str, Any] = {"method": None if chosen is None else repr(chosen)}
    inputs = _inputs(processor, prompt, images, clips).to(loaded.device)
    if compare and chosen is not None:
        unpatch(loaded)
        result["answer_unpruned"] = _answer(loaded, processor, inputs, max_new_tokens)
    trace = None if chosen is None else patch(loaded, chosen)
    result["answer"] = _answer(loaded, processor, inputs, max_new_tokens)
    if overlay is not None and trace is not None:
        from tokprune.trace.overlay import overlay as draw

        draw(trace, [*images, *clips], overlay, processor=processor)
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


def _check_target(path: Path) -> None:
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise BadInput(f"--overlay {path}: unknown image format; use for example .png")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"--overlay {path}: no such folder")


def _inputs(processor: Any, prompt: str, images: list[Any], clips: list[Any]) -> Any:
    """Tokens and pixels of one prompt about all the images and videos."""
    text = prompt_text(processor, prompt, len(images), len(clips))
    videos = {"videos": clips} if clips else {}
    try:
        return processor(images=images or None, text=text, return_tensors="pt", **videos)
    except ImportError as error:  # images for a model that takes videos, without torchvision
        raise BadInput(str(error)) from None


def _answer(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> str:
    import torch

    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(new, skip_special_tokens=True)).strip()
