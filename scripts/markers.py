"""Tables that scripts put into pages, between two markers."""

from __future__ import annotations


def put(text: str, name: str, made: str) -> str:
    """``text`` with ``made`` between ``<!-- name: begin -->`` and ``<!-- name: end -->``.

    Raises:
        ValueError: the markers do not stand there once each, in order.
    """
    begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
    first, last = text.find(begin), text.find(end)
    if text.count(begin) != 1 or text.count(end) != 1 or first > last:
        raise ValueError(f"it should hold {begin} and {end} once each, in this order")
    return f"{text[: first + len(begin)]}\n{made}\n{text[last:]}"
