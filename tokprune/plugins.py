"""What other installed packages add to tokprune, found by their entry points."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any


def plugins(group: str) -> Iterator[tuple[str, Any, str]]:
    """Every object that an installed package names in the entry-point group ``tokprune.GROUP``.

    A package that cannot be imported is left out with a warning, so that it does not take the
    others with it.

    Args:
        group: "methods", "families", "loaders" or "harnesses".

    Yields:
        (name, object, name of the package that brings it).
    """
    for entry in sorted(entry_points(group=f"tokprune.{group}"), key=lambda entry: entry.name):
        package = "" if entry.dist is None else entry.dist.name
        try:
            found = entry.load()
        except Exception as error:  # whatever another package raises while it is imported
            warnings.warn(
                f"tokprune.{group}: {entry.name!r} of package {package!r} cannot be loaded "
                f"({type(error).__name__}: {error}); it is left out",
                stacklevel=3,
            )
            continue
        yield entry.name, found, package
