"""Pictures made smaller or empty on their way from a task to a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tokprune.eval.sweep.reduced_input import blank, downsample
from tokprune.integrations.lmms_eval.arguments import Arguments

Change = Callable[[Any], Any]


def change_of(arguments: Arguments) -> Change | None:
    """What happens to a picture, None for nothing."""
    if arguments.control == "blind":
        return blank
    if arguments.factor is not None:
        return partial(downsample, factor=arguments.factor)
    return None


def changed_visuals(function: Callable[..., Any], change: Change) -> Callable[..., Any]:
    """A ``doc_to_visual`` whose pictures are changed.

    Raises (when called):
        ValueError: it gives something other than pictures (a video, a path), which cannot be.
    """

    def visuals(*args: Any, **kwargs: Any) -> Any:
        return [_changed(picture, change) for picture in function(*args, **kwargs) or []]

    return visuals


def changed_messages(function: Callable[..., Any], change: Change) -> Callable[..., Any]:
    """A ``doc_to_messages`` whose pictures are changed; raises as :func:`changed_visuals`."""

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


def _changed(picture: Any, change: Change) -> Any:
    from PIL import Image

    if not isinstance(picture, Image.Image):
        raise ValueError(
            f"control needs pictures, and this task gives {type(picture).__name__}: "
            f"{str(picture)[:80]!r}"
        )
    return change(picture.convert("RGB"))
