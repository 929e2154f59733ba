"""Every tower and decoder of the supported families, sliding windows included."""

from __future__ import annotations

from typing import Any

import pytest
from methods_table import CORE, CORE_PRUNING
from tiny import BUILDERS

from tokprune.methods import make_method
from tokprune.testing import Case, tiny_family
from tokprune.testing.checks.numbers import equals_oracle
from tokprune.testing.oracle import assert_same_logits, compressed_logits, continuation_tokens

PROMPTS: list[list[Any]] = [[4, "image", 6], [7, "image", 9], [2, "image", 3]]
SIZES = [(20, 40), (40, 20), (30, 30)]
STEPS = 8


def case_of(model: Any, family: str, method: str, options: dict[str, Any]) -> Case:
    made, tiny = make_method(method, **options), tiny_family(BUILDERS[family])
    return Case(made, tiny, model, PROMPTS, SIZES)


@pytest.mark.parametrize("decoder", ["mistral", "qwen2"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", CORE_PRUNING)
def test_masked_oracle(case: str, family: str, tower: str, decoder: str) -> None:
    equals_oracle(case_of(BUILDERS[family](tower, decoder), family, *CORE_PRUNING[case]), STEPS)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", CORE)
def test_sliding_window_wide_enough_changes_nothing(case: str, family: str) -> None:
    logits = []
    for window in (None, 500):
        model = BUILDERS[family](decoder="mistral", sliding_window=window)
        own = case_of(model, family, *CORE[case])
        with own.compress():
            tokens = continuation_tokens(len(PROMPTS), 4)
            logits.append(compressed_logits(model, own.inputs(), tokens))
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
    equals_oracle(case_of(model, "llava", method, options), STEPS)
