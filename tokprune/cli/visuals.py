"""Images and videos of a command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokprune.cli.app import BadInput


def open_image(path: Path, option: str = "--image") -> Any:
    """An image file, RGB.

    Raises:
        BadInput: no such file, or not an image.
    """
    return _open(path, option).convert("RGB")


def open_video(path: Path, frames: int) -> list[Any]:
    """Evenly spaced frames of a folder of images, in the order of their names, or of an animated
    image; all of them where there are no more.

    Raises:
        BadInput: no such file or folder, no image, or frames of different size.
    """
    from PIL import ImageSequence

    from tokprune.eval.sweep.reduced_input import evenly_spaced

    if path.is_dir():
        names = sorted((p for p in path.iterdir() if p.is_file()), key=lambda p: _natural(p.name))
        if not names:
            raise BadInput(f"--video {path}: the folder holds no frames")
        chosen = [open_image(p, "--video") for p in evenly_spaced(names, min(frames, len(names)))]
    else:
        moving = _open(path, "--video")
        every = list(range(getattr(moving, "n_frames", 1)))
        wanted = evenly_spaced(every, min(frames, len(every)))
        shown = enumerate(ImageSequence.Iterator(moving))
        chosen = [frame.convert("RGB") for number, frame in shown if number in wanted]
    if len({frame.size for frame in chosen}) > 1:
        raise BadInput(f"--video {path}: its frames differ in size; they should be equal")
    return chosen


def _open(path: Path, option: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        what = "file or folder" if option == "--video" else "file"
        raise BadInput(f"{option} {path}: no such {what}")
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        hint = "; of a film, give a folder of its frames" if option == "--video" else ""
        raise BadInput(f"{option} {path}: not an image that Pillow can read{hint}") from None


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``2.png`` before ``10.png``."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
