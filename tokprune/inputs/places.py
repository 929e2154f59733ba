"""Places of images and videos in a prompt, whichever model's word stands there."""

from __future__ import annotations

import re
from typing import Any

#: what stands for an image or a video in a prompt for any model
PORTABLE = {"image": "<image>", "video": "<video>"}
#: the words of the families, which users copy from one model's prompt to another's
_WORDS = {
    "<image>": "image", "<|image_pad|>": "image", "<image_soft_token>": "image",
    "<start_of_image>": "image", "[IMG]": "image", "<IMG_CONTEXT>": "image", "<|image|>": "image",
    "<|IMG_PATCH|>": "image", "<image_placeholder>": "image",
    "<video>": "video", "<|video_pad|>": "video", "<|video|>": "video",
}  # fmt: skip
#: markers that templates set around a place; they are set again, and not to be doubled
_BEFORE = (
    r"(?:<\|vision_start\|>|<\|begin_of_image\|>|<\|begin_of_video\|>|<img>|<start_of_image>"
    r"|<\|START_OF_IMG\|>)"
)
_AFTER = (
    r"(?:<\|vision_end\|>|<\|end_of_image\|>|<\|end_of_video\|>|</img>|<end_of_image>"
    r"|<\|END_OF_IMG\|>)"
)


def kinds_of(processor: Any) -> dict[str, str]:
    """Every word for a place and what it stands for, "image" or "video": those of all families,
    and the processor's own."""
    found = dict(_WORDS)
    for name, kind in (("image_token", "image"), ("boi_token", "image"), ("video_token", "video")):
        own = getattr(processor, name, None)
        if isinstance(own, str) and own:
            found[own] = kind
    return found


def place_pattern(processor: Any) -> re.Pattern[str]:
    """A place with its markers; several words between two markers (an image's tokens, written
    out) are one place."""
    known = sorted(kinds_of(processor), key=len, reverse=True)
    words = "|".join(map(re.escape, known))
    return re.compile(
        f"{_BEFORE}(?P<several>{words})(?P=several)*{_AFTER}|{_BEFORE}?(?P<one>{words}){_AFTER}?"
    )


def split_places(processor: Any, text: str) -> list[tuple[str, str]]:
    """A text as ("text", words), ("image", "") and ("video", "") in order. White space between
    places that begin or end it and the rest is left out: templates set their own."""
    kinds, found, start = kinds_of(processor), [], 0
    for place in place_pattern(processor).finditer(text):
        found.append(("text", text[start : place.start()]))
        found.append((kinds[place["several"] or place["one"]], ""))
        start = place.end()
    if not found:
        return [("text", text)]
    found.append(("text", text[start:]))
    texts = [n for n, (kind, words) in enumerate(found) if kind == "text" and words.strip()]
    if texts:
        first, last = texts[0], texts[-1]
        if first:
            found[first] = ("text", found[first][1].lstrip())
        if last < len(found) - 1:
            found[last] = ("text", found[last][1].rstrip())
        found = [
            part for n, part in enumerate(found)
            if part[0] != "text" or (part[1] and first <= n <= last)
        ]  # fmt: skip
    else:
        found = [part for part in found if part[0] != "text"]
    return found
