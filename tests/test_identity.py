"""Keeping everything is bit-identical to the unpatched model: same kernels, same numbers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from tiny import BUILDERS

from tokprune.methods import make_method
from tokprune.testing import Case, tiny_family
from tokprune.testing.checks.numbers import keeps_everything

PROMPTS: list[list[Any]] = [[4, "image", 6], [7, "image", 9]]
SIZES = [(14, 40), (40, 20)]
KEEP_ALL: list[tuple[str, dict[str, Any]]] = [
    ("cdpruner", {"keep": 1.0}),
    ("dart", {"keep": 1.0}),
    ("divprune", {"keep": 1.0}),
    ("fastv", {"keep": 1.0}),
    ("flowcut", {"keep": 1.0, "decoder_cut": False}),
    ("grid", {"keep": 1.0}),
    ("m3", {"level": 0}),
    ("mustdrop", {"spatial": False}),
    ("mustdrop", {"spatial": False, "keep": 1.0, "prune_before": (2, 4)}),
    ("pitome", {"ratio": 1.0}),
    ("pitome", {"keep": 1.0}),
    ("pool", {"window": 1}),
    ("random", {"keep": 1.0}),
    ("todre", {"keep": 1.0, "stage2": False}),
    ("todre", {"keep": 1.0, "tau": 0.0, "prune_before": 5}),
    ("tome", {"r": 0}),
    ("transprune", {"keep": (1.0, 1.0), "prune_before": (3, 5), "transition_layers": (2, 3)}),
    ("visionzip", {"keep": 1.0}),
]


@functools.cache
def build(family: str, attention: str) -> Any:
    return BUILDERS[family](attention=attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize(("method", "options"), KEEP_ALL, ids=[str(k) for k in KEEP_ALL])
def test_keeping_everything_changes_no_bit(
    method: str, options: dict[str, Any], family: str, attention: str
) -> None:
    made, tiny = make_method(method, **options), tiny_family(BUILDERS[family])
    keeps_everything(Case(made, tiny, build(family, attention), PROMPTS, SIZES))
