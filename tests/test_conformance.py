"""Masked-oracle conformance: pruning method × family × attention backend × batch shape."""

from __future__ import annotations

from typing import Any

import pytest
from methods_table import PRUNING
from oracle import (
    assert_same_logits,
    compressed_logits,
    continuation_tokens,
    oracle_logits,
)
from tiny import BUILDERS, make_inputs

import tokprune

STEPS = 8
BATCHES: dict[str, list[list[Any]]] = {
    "single": [[4, "image", 6]],
    "four": [[4, "image", 6], [7, "image", 9], [2, "image", 3], [5, "image", 12]],
}


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], Any]:
    return {}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", PRUNING)
def test_equals_unpruned_model_with_dropped_keys_hidden(
    models: dict[tuple[str, str], Any], case: str, family: str, attention: str, batch: str
) -> None:
    if (family, attention) not in models:
        models[family, attention] = BUILDERS[family](attention=attention)
    model = models[family, attention]
    sizes = [(14, 40), (40, 14), (30, 22), (10, 72)][: len(BATCHES[batch])]
    inputs = make_inputs(model, BATCHES[batch], sizes)
    method, options = PRUNING[case]
    continuation = continuation_tokens(len(BATCHES[batch]), STEPS)
    with tokprune.compress(model, method, **options) as trace:
        got = compressed_logits(model, inputs, continuation)
    assert trace.last is not None
    assert sum(map(sum, trace.last.layers[-1].counts)) < sum(
        len(image.columns) for image in trace.last.images
    ), "the method dropped nothing: the comparison would show nothing"
    want = oracle_logits(model, inputs, trace.last, continuation)
    assert_same_logits(got, want)
