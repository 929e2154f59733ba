"""What controls do to a picture: make it smaller, or empty."""

from __future__ import annotations

import math
from typing import Any

#: processors cannot tell height from colour channels on pictures with sides like these
_TINY = 4


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
