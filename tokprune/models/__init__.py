"""Models that ship with the package, by name."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

_FOLDER = Path(__file__).parent


def shipped_models() -> tuple[str, ...]:
    """Names that :func:`resolve` knows."""
    return tuple(sorted(p.parent.name for p in _FOLDER.glob("*/config.json")))


def resolve(path: str | PathLike[str]) -> str:
    """The folder of a shipped model, or ``path`` as it is.

    A folder of yours with the same name is reached as ``./mini``.
    """
    name = fspath(path)
    return str(_FOLDER / name) if name in shipped_models() else name
