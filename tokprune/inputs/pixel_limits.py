"""How many pixels an image may have that a model of any resolution is shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tokprune.errors import PictureError

if TYPE_CHECKING:
    from PIL import Image

#: pixels of an image on its way to a model: a gibibyte, as Pillow holds them
_MOST = 2**28
#: sides of an image, long ÷ short, in transformers' ``smart_resize`` (Qwen-VL, GLM-4V)
_MOST_RATIO = 200


def limit_pixels(processor: Any, least: int | None, most: int | None) -> None:
    """Set the limits of a processor whose model takes images as large as they are (Qwen-VL,
    GLM-4V): smaller images are enlarged, larger ones shrunk. For videos the limits are counted as
    the model's own processor counts them: of every frame (Qwen2-VL, Qwen2.5-VL), or of all frames
    together.

    Args:
        processor: of the model; changed in place.
        least, most: pixels; None leaves a limit as it is.

    Raises:
        ValueError: the processor has no such limits, or the two contradict each other.
    """
    limits = {"min_pixels": least, "max_pixels": most}
    given = ", ".join(f"{name}={value}" for name, value in limits.items() if value is not None)
    if not given:
        return
    for name, value in limits.items():
        if value is not None and (isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}={value!r} should be a number of pixels, at least 1")
    found = list(_limited(processor))
    if not found:
        raise ValueError(
            f"{given}: {type(processor).__name__} shows images in sizes of its own, and has no "
            "limits of pixels; models of any resolution do (Qwen-VL, GLM-4V). Leave them out"
        )
    for part in found:
        size = dict(part.size)
        low = size["shortest_edge"] if least is None else least
        high = size["longest_edge"] if most is None else most
        if low > high:
            raise ValueError(
                f"{given}: at least {low} and at most {high} pixels contradict each other; "
                "min_pixels should not be above max_pixels"
            )
        part.size = type(part.size)(**{**size, "shortest_edge": low, "longest_edge": high})
        for name, value in (("min_pixels", low), ("max_pixels", high)):
            if hasattr(part, name):  # the names of transformers 4
                setattr(part, name, value)


def check_shape(processor: Any, image: Image.Image, name: str, *, video: bool = False) -> None:
    """Refuse an image so long and thin that the model's processor would stop, or fill the memory:
    those of CLIP scale the short side to the model's and cut out the middle only then.

    Args:
        processor: of the model, or an image processor.
        image: or a frame of a video.
        name: what the user calls it; the error text begins with it.
        video: whether it is a frame.

    Raises:
        PictureError: names the shape and what would be right.
    """
    part = getattr(processor, "image_processor", processor)
    if video:
        part = getattr(processor, "video_processor", None) or part
    size = {k: v for k, v in dict(getattr(part, "size", None) or {}).items() if v is not None}
    short, long = sorted(image.size)
    shape = f"{name}: an image of {image.width:,} × {image.height:,} pixels"
    if hasattr(part, "merge_size"):
        if long > _MOST_RATIO * short:
            raise PictureError(
                f"{shape} is too thin for {type(part).__name__}; its longer side should be at "
                f"most {_MOST_RATIO} times the shorter one; cut it into pieces"
            )
        return
    made = 0
    # tiles are cut by other rules, and their overview is squashed
    if set(size) == {"shortest_edge"} and not hasattr(part, "image_grid_pinpoints"):
        made = size["shortest_edge"] ** 2 * long // short
    if type(part).__name__.startswith("LlavaImageProcessor") and part.do_pad:
        made = long**2
    if made > _MOST:
        raise PictureError(
            f"{shape} would become one of {made:,} pixels in {type(part).__name__}, more than "
            f"{_MOST:,}; shrink it, or cut it into pieces"
        )


def _limited(processor: Any) -> Iterator[Any]:
    """Parts of a processor that cut images of any size into patches."""
    for name in ("image_processor", "video_processor"):
        part = getattr(processor, name, None)
        size = dict(getattr(part, "size", None) or {})
        if hasattr(part, "merge_size") and {"shortest_edge", "longest_edge"} <= set(size):
            yield part
