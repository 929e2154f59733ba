"""A video as some of its frames, which know where in it they stood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Args:
        frames: PIL images of one size, in order.
        places: their numbers in the video, counted from 0.
        total: frames that the video has.
        fps: frames a second of the video.
    """

    frames: list[Any]
    places: list[int]
    total: int
    fps: float

    @property
    def shown_fps(self) -> float:
        """Frames a second of those that are shown."""
        return len(self.frames) / self.total * self.fps

    def metadata(self) -> dict[str, Any]:
        """What transformers' video processors are told of a video."""
        width, height = self.frames[0].size
        return {
            "total_num_frames": self.total, "fps": self.fps, "duration": self.total / self.fps,
            "frames_indices": self.places, "height": height, "width": width,
        }  # fmt: skip


def evenly_spaced(frames: Sequence[Any], number: int) -> list[Any]:
    """The frames in the middle of that many equal stretches of a video."""
    return [frames[(2 * n + 1) * len(frames) // (2 * number)] for n in range(number)]
