"""Masked-oracle conformance: pruning method × family × attention backend × batch shape."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from methods_table import PRUNING
from tiny import BUILDERS

from tokprune.methods import make_method
from tokprune.testing import Case, tiny_family
from tokprune.testing.case import dropped
from tokprune.testing.checks.numbers import equals_oracle
from tokprune.testing.oracle import merges

SIZES = [(14, 40), (40, 14), (30, 22), (10, 72)]
BATCHES: dict[str, list[list[Any]]] = {
    "single": [[4, "image", 6]],
    "four": [[4, "image", 6], [7, "image", 9], [2, "image", 3], [5, "image", 12]],
}


@functools.cache
def build(family: str, attention: str) -> Any:
    return BUILDERS[family](attention=attention)


@pytest.mark.parametrize(
    ("batch", "attention"),
    [
        ("four", "sdpa"),
        *[
            pytest.param(*other, marks=pytest.mark.full)
            for other in (("four", "eager"), ("single", "sdpa"), ("single", "eager"))
        ],
    ],
)
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", PRUNING)
def test_equals_unpruned_model_with_dropped_keys_hidden(
    case: str, family: str, attention: str, batch: str
) -> None:
    method, options = PRUNING[case]
    prompts, tiny = BATCHES[batch], tiny_family(BUILDERS[family])
    own = Case(
        make_method(method, **options), tiny, build(family, attention), prompts,
        SIZES[: len(prompts)],
    )  # fmt: skip
    prefill = equals_oracle(own, steps=8).prefill
    assert not merges(prefill)
    assert dropped(prefill), "the method dropped nothing: the comparison would show nothing"
