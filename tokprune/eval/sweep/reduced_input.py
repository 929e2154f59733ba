"""What controls do to an image or a video: make it smaller, shorter, or empty."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokprune.inputs.clips import evenly_spaced

#: the controls that show less
REDUCED_INPUTS = ("downsample", "frames")
#: processors cannot tell height from colour channels on images with sides like these
_TINY = 4


@dataclass(frozen=True)
class ReducedInput:
    """Less to look at, without a method. ``factor``: by which the sides of images and frames are
    divided; ``frames``: how many of a video are left, evenly spaced (None: all)."""

    factor: float = 1.0
    frames: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> ReducedInput:
        """From the options of a trial."""
        return cls(options.get("factor", 1.0), options.get("frames"))

    @property
    def options(self) -> dict[str, Any]:
        """The options of a trial that say so."""
        return {"factor": self.factor} if self.frames is None else {"frames": self.frames}

    def __call__(self, visual: Any) -> Any:
        """An image, or a list of frames, made smaller."""
        if self.frames is not None:
            visual = evenly_spaced(visual, self.frames)
        if self.factor == 1:
            return visual
        return each(visual, lambda image: downsample(image, self.factor))


def each(visual: Any, change: Callable[[Any], Any]) -> Any:
    """An image changed, or every frame of a list of them."""
    return [change(frame) for frame in visual] if isinstance(visual, list) else change(visual)


def downsample_factor(visual_tokens: float, budget: float) -> float:
    """Linear factor r = √(N / budget): an image shrunk by it has budget/N of its pixels."""
    return math.sqrt(visual_tokens / budget)


def downsample(image: Any, factor: float) -> Any:
    """An image with sides divided by ``factor`` (bicubic, at least one pixel each).

    Results with a side of less than four pixels are blown up again by repeating every pixel, which
    adds nothing to what they show.
    """
    from PIL import Image

    width, height = (max(1, int(side / factor)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    if min(width, height) < _TINY:
        small = small.resize((_TINY * width, _TINY * height), Image.Resampling.NEAREST)
    return small


def blank(image: Any) -> Any:
    """A grey image of the same size: with the prompt's form unchanged, it shows nothing."""
    from PIL import Image

    return Image.new("RGB", image.size, (128, 128, 128))
