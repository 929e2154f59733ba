"""What is made once of the same objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Once:
    """Results by the objects that they were made of, which are kept alive: layers that share these
    share them, too. Objects are the same by identity, which ``torch.compile`` can follow (it knows
    no ``id`` of a tensor); numbers and texts by value."""

    def __init__(self) -> None:
        #: by the kind of result, the oldest first
        self._kept: dict[str, list[tuple[tuple[Any, ...], Any]]] = {}

    def __call__(self, kind: str, make: Callable[[], Any], *sources: Any) -> Any:
        """``make()``, once for the same sources of this kind of result."""
        kept = self._kept.setdefault(kind, [])
        for known, made in reversed(kept):  # a layer most often wants what the one before it did
            if _same(known, sources):
                return made
        made = make()
        kept.append((sources, made))
        return made


def _same(known: tuple[Any, ...], sources: tuple[Any, ...]) -> bool:
    for one, other in zip(known, sources):
        if one is not other and not (isinstance(one, int | str) and one == other):
            return False
    return True
