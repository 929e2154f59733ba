"""Films (mp4, mkv, webm, …), read by PyAV, which the extra ``film`` brings."""

from __future__ import annotations

from os import PathLike
from typing import Any

from tokprune.inputs.clips import Clip, evenly_spaced


def read_film(path: str | PathLike[str], frames: int) -> Clip:
    """Evenly spaced frames of a film, all of them where it has no more.

    The film is decoded once from its start to the last of them.

    Args:
        path: the file.
        frames: most frames.

    Raises:
        ImportError: PyAV is not installed; names the extra.
        ValueError: not a film that PyAV can read, or one without pictures.
    """
    try:
        import av
    except ImportError:
        raise ImportError(
            "films are read by PyAV, which is not installed: pip install 'tokprune[film]', or give "
            "a folder of its frames"
        ) from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("the file has no pictures")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or 0) or 1.0
            total = int(stream.frames)
            if not total:  # some containers do not say; packets need no decoding
                total = sum(1 for packet in container.demux(stream) if packet.size)
        chosen, seen = _decode(av, path, frames, total)
        if seen < total and len(chosen) < min(frames, total):  # it promises more than there is
            total = seen
            chosen, _ = _decode(av, path, frames, total)
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"not a film that PyAV can read: {error}") from None
    if not chosen:
        raise ValueError("the film has no frames")
    return Clip(list(chosen.values()), list(chosen), total, fps)


def _decode(
    av: Any, path: str | PathLike[str], frames: int, total: int
) -> tuple[dict[int, Any], int]:
    """The wanted frames by their numbers, and how many frames were decoded."""
    wanted = set(evenly_spaced(range(total), min(frames, total)))
    chosen: dict[int, Any] = {}
    seen = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            seen = number + 1
            if number in wanted:
                chosen[number] = _upright(frame)
            if len(chosen) == len(wanted):
                break
    return chosen, seen


def _upright(frame: Any) -> Any:
    """A frame as an image, turned as the file says (films of telephones lie on their side)."""
    image = frame.to_image()
    turn = int(getattr(frame, "rotation", 0) or 0)
    return image.rotate(turn, expand=True) if turn else image
