"""One table of methods that drives every suite: adding a method adds it everywhere.

Options suit the tiny models of :mod:`tiny` (36 patches per tile, 8 decoder layers).
"""

from __future__ import annotations

from typing import Any

#: methods that only drop tokens, so that the masked oracle applies
PRUNING: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {"keep": 10}),
    "fastv": ("fastv", {"keep": 7, "layer": 2}),
}

#: methods that merge tokens: compared with slow references instead
MERGING: dict[str, tuple[str, dict[str, Any]]] = {}

ALL = {**PRUNING, **MERGING}
