"""Text of others (questions, answers, names) as something that every file and screen can hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: what neither XML nor a terminal takes, and halves of characters, which no file can hold
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_LONGEST = 48


def legible(value: Any) -> Any:
    """JSON values with the replacement character where a text has what cannot be shown."""
    if isinstance(value, str):
        if value.isprintable():
            return value
        return _UNPRINTABLE.sub("\ufffd", value.replace("\r\n", "\n"))
    if isinstance(value, Mapping):
        return {legible(name): legible(item) for name, item in value.items()}
    return [legible(item) for item in value] if isinstance(value, list) else value


def one_line(text: str) -> str:
    """Without line breaks."""
    return " ".join(text.split())


def short(text: str) -> str:
    """A line that fits beside a plot."""
    text = one_line(text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
