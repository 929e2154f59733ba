"""``tokprune run``: answer one prompt with a compressed model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tokprune.cli.app import BadInput, app
from tokprune.cli.method import Keep, Name, Options, Setting, method_options, named_method
from tokprune.cli.model import load_model, place_of
from tokprune.cli.values import Device, Dtype, TrustRemoteCode
from tokprune.cli.visuals import named, open_image, open_video

MinPixels = Annotated[
    int | None,
    typer.Option(min=1, help="Enlarge smaller images to this; for models of any resolution."),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Shrink larger images to this; for models of any resolution (Qwen-VL, GLM-4V), whose "
        "number of visual tokens it bounds before --keep takes its share.",
    ),
]


@app.command()
def run(
    model: Annotated[str, typer.Option(help="'mini' (shipped), a model folder, or a hub name.")],
    prompt: Annotated[
        str,
        typer.Option(
            help="The question; <image> and <video> in it say where they stand, else they come "
            "first."
        ),
    ],
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Image, upright as its EXIF data say, transparency on white; repeat for several.",
        ),
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Video, for models that take any: a film (with the extra 'film'), a folder of "
            "frames, or an animated image; repeat for several.",
        ),
    ] = None,
    frames: Annotated[
        int, typer.Option(min=1, help="Most frames shown of a video, evenly spaced.")
    ] = 8,
    fps: Annotated[
        float, typer.Option(help="Frames a second of a folder of frames (films say it themselves).")
    ] = 2.0,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    encode_at_once: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images, tiles or frames that the vision encoder runs at a time (all): fewer take "
            "less memory. Needs --method or --setting.",
        ),
    ] = None,
    method: Name = None,
    keep: Keep = None,
    option: Options = None,
    setting: Setting = None,
    overlay: Annotated[Path | None, typer.Option(help="Save an image of what was kept.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.auto,
    dtype: Annotated[Dtype, typer.Option(help="auto: as the checkpoint says.")] = Dtype.auto,
    trust_remote_code: TrustRemoteCode = False,
    compare: Annotated[bool, typer.Option("--compare", help="Answer without pruning too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Answer a prompt about images or videos with a compressed model, and show what was
    removed."""
    options = method_options(keep, option)
    given = {
        "--keep/--option": options, "--overlay": overlay, "--compare": compare,
        "--encode-at-once": encode_at_once,
    }  # fmt: skip
    used = next((name for name, value in given.items() if value), None)
    if method is None and setting is None and used is not None:
        raise BadInput(f"{used} needs --method or --setting; see 'tokprune methods'")
    if overlay is not None:
        if not image and not video:
            raise BadInput("--overlay needs an --image or a --video to draw on")
        _check_target(overlay)
    images = [open_image(path) for path in image or []]
    if not fps > 0:
        raise BadInput(f"--fps {fps}: it should be above 0")
    clips = [open_video(path, frames, fps) for path in video or []]
    chosen = named_method(method, options, setting)
    from tokprune.api import patch, unpatch

    loaded, processor = load_model(
        model, place_of(device), dtype, chosen, min_pixels=min_pixels, max_pixels=max_pixels,
        encode_at_once=encode_at_once, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    _check_shapes(processor, [*zip(image or [], images)], [*zip(video or [], clips)])
    if clips:
        _check_videos(model, loaded, processor, clips)
    result: dict[str, Any] = {"method": None if chosen is None else repr(chosen)}
    inputs = _inputs(loaded, processor, prompt, images, clips)
    if compare and chosen is not None:
        unpatch(loaded)
        result["answer_unpruned"] = _answer(loaded, processor, inputs, max_new_tokens)
    trace = None if chosen is None else patch(loaded, chosen, encode_at_once=encode_at_once)
    result["answer"] = _answer(loaded, processor, inputs, max_new_tokens)
    if overlay is not None and trace is not None:
        from tokprune.trace.overlay import overlay as draw

        shown = [*images, *_as_traced(loaded, clips)]
        try:
            draw(trace, shown, overlay, processor=processor)
        except ValueError as error:  # a model to which every tile is an image
            raise BadInput(f"--overlay {overlay}: {error}") from None
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


def _check_shapes(
    processor: Any, images: list[tuple[str, Any]], clips: list[tuple[str, Any]]
) -> None:
    """Whether the processor can take images and videos of these shapes."""
    from tokprune.inputs.pixel_limits import check_shape

    for path, image in images:
        check_shape(processor, image, named("--image", path))
    for path, clip in clips:
        check_shape(processor, clip.frames[0], named("--video", path), video=True)


def _check_videos(name: str, model: Any, processor: Any, clips: list[Any]) -> None:
    """Whether a model takes these videos."""
    from tokprune.families import bind

    facts = bind(model).facts
    if not facts.videos and getattr(processor, "video_processor", None) is None:
        raise BadInput(
            f"--video: model {name} takes images only; give frames as images: --image, repeated"
        )
    # patches of any number of frames stand behind one another where positions have three axes
    if facts.axes == 1 and len({len(clip.frames) for clip in clips}) > 1:
        raise BadInput("--video: all videos of a prompt should have equally many frames")


def _inputs(model: Any, processor: Any, prompt: str, images: list[Any], clips: list[Any]) -> Any:
    """Tokens and pixels of one prompt about all the images and videos."""
    from tokprune.errors import ChatTemplateError
    from tokprune.inputs.prompts import model_inputs, prompt_text

    try:
        text = prompt_text(processor, prompt, len(images), len(clips))
    except ChatTemplateError:
        raise
    except ValueError as error:
        raise BadInput(f"--prompt: {error}") from None
    try:
        made = model_inputs(processor, [text], [images], [clips], model=model)
    except ImportError as error:  # what the processor needs torchvision for
        raise BadInput(str(error)) from None
    return made.to(model.device)


def _as_traced(model: Any, clips: list[Any]) -> list[Any]:
    """Videos as the overlay wants them; to models without videos of their own every frame is an
    image."""
    from tokprune.families import bind

    if bind(model).facts.videos:
        return [clip.frames for clip in clips]
    return [frame for clip in clips for frame in clip.frames]


def _answer(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> str:
    import torch

    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(new, skip_special_tokens=True)).strip()
