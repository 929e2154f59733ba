"""The original package and transformers' own classes, with the same weights, method and budget:
the same tokens kept in every layer, the same logits.

The reference runs in another environment (make_reference.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods_table import ALL, CORE
from original import compressed_logits, continuation_tokens

import tokprune

MODELS = {"square": ALL, "anyres": ALL, "anyres-mistral": CORE}


@pytest.mark.parametrize("prompt", ["one", "ragged"])
@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in MODELS.items() for case in cases]
)
def test_keeps_the_same_tokens_and_answers_alike(
    original: Callable[..., Any], name: str, case: str, prompt: str
) -> None:
    form = original(name)
    method, options = ALL[case]
    inputs = form.inputs(prompt)
    continuation = continuation_tokens(len(inputs["input_ids"]), form.known["steps"])
    with tokprune.compress(form.model, method, **options) as trace:
        got = compressed_logits(form.model, inputs, continuation)
    want = {
        key.removeprefix(f"{prompt}/{case}/"): value
        for key, value in form.cases.items()
        if key.startswith(f"{prompt}/{case}/")
    }
    assert trace.last is not None
    assert len(trace.last.layers) == len(want) - 1
    for number, layer in enumerate(trace.last.layers):
        assert torch.equal(layer.column, want[f"layer{number}"]), f"layer {number}"
    torch.testing.assert_close(got, want["logits"], atol=1e-4, rtol=0)
