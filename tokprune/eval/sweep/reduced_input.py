"""What controls do to a picture or a video: make it smaller, shorter, or empty."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: the controls that show less
SMALLER = ("downsample", "frames")
#: processors cannot tell height from colour channels on pictures with sides like these
_TINY = 4


@dataclass(frozen=True)
class Smaller:
    """Less to look at, without a method. ``factor``: by which the sides of pictures and frames are
    divided; ``frames``: how many of a video are left, evenly spaced (None: all)."""

    factor: float = 1.0
    frames: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Smaller:
        """From the options of a cell."""
        return cls(options.get("factor", 1.0), options.get("frames"))

    @property
    def options(self) -> dict[str, Any]:
        """The options of a cell that say so."""
        return {"factor": self.factor} if self.frames is None else {"frames": self.frames}

    def __call__(self, visual: Any) -> Any:
        """A picture, or a list of frames, made smaller."""
        if self.frames is not None:
            visual = evenly_spaced(visual, self.frames)
        if self.factor == 1:
            return visual
        return each(visual, lambda picture: downsample(picture, self.factor))


def each(visual: Any, change: Callable[[Any], Any]) -> Any:
    """A picture changed, or every frame of a list of them."""
    return [change(frame) for frame in visual] if isinstance(visual, list) else change(visual)


def evenly_spaced(frames: list[Any], number: int) -> list[Any]:
    """The frames in the middle of that many equal stretches of a video."""
    return [frames[(2 * n + 1) * len(frames) // (2 * number)] for n in range(number)]


def downsample_factor(visual_tokens: float, budget: float) -> float:
    """Linear factor r = √(N / budget): a picture shrunk by it has budget/N of its pixels."""
    return math.sqrt(visual_tokens / budget)


def downsample(picture: Any, factor: float) -> Any:
    """A picture with sides divided by ``factor`` (bicubic, at least one pixel each).

    Results with a side of less than four pixels are blown up again by repeating every pixel, which
    adds nothing to what they show.
    """
    from PIL import Image

    width, height = (max(1, int(side / factor)) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.BICUBIC)
    if min(width, height) < _TINY:
        small = small.resize((_TINY * width, _TINY * height), Image.Resampling.NEAREST)
    return small


def blank(picture: Any) -> Any:
    """A grey picture of the same size: with the prompt's form unchanged, it shows nothing."""
    from PIL import Image

    return Image.new("RGB", picture.size, (128, 128, 128))
