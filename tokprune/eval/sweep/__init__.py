"""Sweeps: methods × budgets on a benchmark, one row per question, resumable at any moment."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokprune.eval.sweep.results import Run, read_run
    from tokprune.eval.sweep.runner import run_sweep
    from tokprune.eval.sweep.settings import Settings, read_settings

__all__ = ["Run", "Settings", "read_run", "read_settings", "run_sweep"]

# a report reads runs without torch, so names are fetched when first used
_HOME = {
    "Run": "results",
    "Settings": "settings",
    "read_run": "results",
    "read_settings": "settings",
    "run_sweep": "runner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tokprune.eval.sweep' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tokprune.eval.sweep.{_HOME[name]}"), name)
    globals()[name] = value
    return value
