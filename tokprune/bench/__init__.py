"""What compression costs and saves in time and memory, against no compression and the ideal.

:func:`bench` is what ``tokprune bench`` runs; :func:`measure_trials` times variants on one batch.
Nothing heavy is imported before one of them is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokprune.bench.measure import measure_trials
    from tokprune.bench.run import bench

__all__ = ["bench", "measure_trials"]

_HOME = {"bench": "run", "measure_trials": "measure"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
