"""Images and videos of a command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokprune.cli.app import BadInput

if TYPE_CHECKING:
    from tokprune.inputs.clips import Clip


def open_image(path: Path, option: str = "--image") -> Any:
    """An image file, RGB.

    Raises:
        BadInput: no such file, or not an image.
    """
    return _open(path, option).convert("RGB")


def open_video(path: Path, frames: int, fps: float = 2.0) -> Clip:
    """Evenly spaced frames of a film, of a folder of images, in the order of their names, or of an
    animated image; all of them where there are no more.

    Args:
        path: file or folder.
        frames: most frames.
        fps: frames a second of what does not say so itself.

    Raises:
        BadInput: no such file or folder, no image or film, frames of different size, or a film
            without the package that reads films.
    """
    from PIL import ImageSequence

    from tokprune.inputs.clips import Clip, evenly_spaced

    if path.is_dir():
        names = sorted((p for p in path.iterdir() if p.is_file()), key=lambda p: _natural(p.name))
        if not names:
            raise BadInput(f"--video {path}: the folder holds no frames")
        total = len(names)
        places = evenly_spaced(range(total), min(frames, total))
        chosen = [open_image(names[place], "--video") for place in places]
    else:
        moving = _image(path, "--video")
        if moving is None:
            return _film(path, frames)
        total = getattr(moving, "n_frames", 1)
        places = evenly_spaced(range(total), min(frames, total))
        shown = enumerate(ImageSequence.Iterator(moving))
        chosen = [frame.convert("RGB") for number, frame in shown if number in places]
    if len({frame.size for frame in chosen}) > 1:
        raise BadInput(f"--video {path}: its frames differ in size; they should be equal")
    return Clip(chosen, places, total, fps)


def _film(path: Path, frames: int) -> Clip:
    from tokprune.inputs.films import read_film

    try:
        return read_film(path, frames)
    except (ImportError, ValueError) as error:
        hint = "" if isinstance(error, ImportError) else "; or give a folder of its frames"
        raise BadInput(f"--video {path}: {error}{hint}") from None


def _image(path: Path, option: str) -> Any:
    """An image file; None where Pillow cannot read it."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        what = "file or folder" if option == "--video" else "file"
        raise BadInput(f"{option} {path}: no such {what}")
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        return None


def _open(path: Path, option: str) -> Any:
    image = _image(path, option)
    if image is None:
        raise BadInput(f"{option} {path}: not an image that Pillow can read")
    return image


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``2.png`` before ``10.png``."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
