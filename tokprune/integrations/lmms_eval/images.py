"""Images made smaller or empty on their way from a task to a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tokprune.eval.sweep.reduced_input import blank, downsample
from tokprune.integrations.lmms_eval.arguments import Arguments

Change = Callable[[Any], Any]


def change_of(arguments: Arguments) -> Change | None:
    """What happens to an image, None for nothing."""
    if arguments.control == "blind":
        return blank
    if arguments.factor is not None:
        return partial(downsample, factor=arguments.factor)
    return None


def changed_visuals(function: Callable[..., Any], change: Change) -> Callable[..., Any]:
    """A ``doc_to_visual`` whose images are changed.

    Raises (when called):
        ValueError: it gives something other than images (a video, a path), which cannot be.
    """

    def visuals(*args: Any, **kwargs: Any) -> Any:
        return [_changed(image, change) for image in function(*args, **kwargs) or []]

    return visuals


def changed_messages(function: Callable[..., Any], change: Change) -> Callable[..., Any]:
    """A ``doc_to_messages`` whose images are changed; raises as :func:`changed_visuals`."""

    def part(content: Any) -> Any:
        if isinstance(content, dict) and content.get("type") in ("image", "video"):
            return {**content, "url": _changed(content.get("url"), change)}
        return content

    def messages(*args: Any, **kwargs: Any) -> Any:
        return [
            {**m, "content": [part(c) for c in m["content"]]}
            if isinstance(m.get("content"), list)
            else m
            for m in function(*args, **kwargs)
        ]

    return messages


def _changed(image: Any, change: Change) -> Any:
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise ValueError(
            f"control needs images, and this task gives {type(image).__name__}: {str(image)[:80]!r}"
        )
    # the same pixels that lmms-eval's models get without a control, so nothing is turned here
    return change(image.convert("RGB"))
