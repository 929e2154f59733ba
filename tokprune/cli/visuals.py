"""Images and videos of a command line."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokprune.cli.app import BadInput
from tokprune.inputs.pictures import UnknownFormatError, opened, read_picture

if TYPE_CHECKING:
    from tokprune.inputs.clips import Clip


def open_image(source: str | Path, option: str = "--image") -> Any:
    """An image, RGB and upright.

    Args:
        source: the path of a file, or a ``data:`` URL.
        option: that it was given to.

    Raises:
        PictureError: names option and source.
    """
    return read_picture(source, named(option, source))


def open_video(source: str | Path, frames: int, fps: float = 2.0) -> Clip:
    """Evenly spaced frames of a film, of a folder of images, in the order of their names, or of an
    animated image; all of them where there are no more.

    Args:
        source: file or folder; hidden files of a folder are left out.
        frames: most frames.
        fps: frames a second of what does not say so itself.

    Raises:
        BadInput, PictureError: no such file or folder, no image or film, frames of different size,
            or a film without the package that reads films.
    """
    from tokprune.inputs.clips import Clip, evenly_spaced

    path, name = Path(source), named("--video", source)
    if ":" not in str(source) and not os.path.exists(source):
        raise BadInput(f"{name}: no such file or folder")
    if os.path.isdir(source):
        names = sorted(
            (p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")),
            key=lambda p: _natural(p.name),
        )
        if not names:
            raise BadInput(f"{name}: the folder holds no frames")
        total = len(names)
        places = evenly_spaced(range(total), min(frames, total))
        chosen = [open_image(names[place], "--video") for place in places]
    else:
        try:
            with opened(source, name) as moving:
                total = getattr(moving, "n_frames", 1)
                places = evenly_spaced(range(total), min(frames, total))
                chosen = []
                for place in places:
                    moving.seek(place)
                    chosen.append(read_picture(moving, f"{name}, frame {place}"))
        except UnknownFormatError:
            return _film(path, frames)
    if len({frame.size for frame in chosen}) > 1:
        raise BadInput(f"{name}: its frames differ in size; they should be equal")
    return Clip(chosen, places, total, fps)


def named(option: str, source: str | Path) -> str:
    """What error texts call an image or a video."""
    text = str(source)
    text = text if text.isprintable() else repr(text)
    return f"{option} {text if len(text) <= 300 else text[:60] + '…'}"


def _film(path: Path, frames: int) -> Clip:
    from tokprune.inputs.films import read_film

    try:
        return read_film(path, frames)
    except (ImportError, ValueError) as error:
        hint = "" if isinstance(error, ImportError) else "; or give a folder of its frames"
        raise BadInput(f"--video {path}: {error}{hint}") from None


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``2.png`` before ``10.png``."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
