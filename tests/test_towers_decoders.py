"""Every tower and decoder of the supported families, sliding windows included."""

from __future__ import annotations

from typing import Any

import pytest
from methods_table import CORE, CORE_PRUNING
from oracle import (
    assert_same_logits,
    compressed_logits,
    continuation_tokens,
    oracle_logits,
)
from tiny import BUILDERS, make_inputs

import tokprune

PROMPTS = [[4, "image", 6], [7, "image", 9], [2, "image", 3]]
SIZES = [(20, 40), (40, 20), (30, 30)]
STEPS = 8


@pytest.mark.parametrize("decoder", ["mistral", "qwen2"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", CORE_PRUNING)
def test_masked_oracle(case: str, family: str, tower: str, decoder: str) -> None:
    method, options = CORE_PRUNING[case]
    model = BUILDERS[family](tower, decoder)
    inputs = make_inputs(model, PROMPTS, SIZES)
    continuation = continuation_tokens(len(PROMPTS), STEPS)
    with tokprune.compress(model, method, **options) as trace:
        got = compressed_logits(model, inputs, continuation)
    want = oracle_logits(model, inputs, trace.last, continuation)
    assert_same_logits(got, want)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", CORE)
def test_sliding_window_wide_enough_changes_nothing(case: str, family: str) -> None:
    method, options = CORE[case]
    plain = BUILDERS[family](decoder="mistral")
    wide = BUILDERS[family](decoder="mistral", sliding_window=500)
    inputs = make_inputs(plain, PROMPTS, SIZES)
    continuation = continuation_tokens(len(PROMPTS), 4)
    logits = []
    for model in (plain, wide):
        with tokprune.compress(model, method, **options):
            logits.append(compressed_logits(model, inputs, continuation))
    assert_same_logits(logits[0], logits[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("random", {"keep": 20}),
        ("random", {"keep": 20, "positions": "preserve"}),
        ("fastv", {"keep": 10}),
        ("fastv", {"keep": 10, "positions": "compact"}),
    ],
)
def test_narrow_sliding_window(method: str, options: dict[str, Any], attention: str) -> None:
    """A window that binds is counted in rotary positions, whatever was dropped in between."""
    window = 16
    model = BUILDERS["llava"](decoder="mistral", sliding_window=window, attention=attention)
    inputs = make_inputs(model, PROMPTS)
    continuation = continuation_tokens(len(PROMPTS), STEPS)
    with tokprune.compress(model, method, **options) as trace:
        got = compressed_logits(model, inputs, continuation)
    want = oracle_logits(model, inputs, trace.last, continuation, window=window)
    assert_same_logits(got, want)
