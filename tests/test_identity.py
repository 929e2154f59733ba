"""Keeping everything is bit-identical to the unpatched model: same kernels, same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BUILDERS, make_inputs

import tokprune

PROMPTS = [[4, "image", 6], [7, "image", 9]]
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
    ("mustdrop", {"spatial": False, "keep": 1.0, "pruning_layers": (1, 3)}),
    ("pitome", {"ratio": 1.0}),
    ("pitome", {"keep": 1.0}),
    ("pool", {"window": 1}),
    ("random", {"keep": 1.0}),
    ("todre", {"keep": 1.0, "stage2": False}),
    ("todre", {"keep": 1.0, "tau": 0.0, "check_layers": 5}),
    ("tome", {"r": 0}),
    ("transprune", {"keep": (1.0, 1.0), "prune_layers": (3, 5), "accumulate_layers": (3, 4)}),
    ("visionzip", {"keep": 1.0}),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize(("method", "options"), KEEP_ALL, ids=[str(k) for k in KEEP_ALL])
def test_keeping_everything_changes_no_bit(
    method: str, options: dict[str, Any], family: str, attention: str
) -> None:
    model = BUILDERS[family](attention=attention)
    inputs = make_inputs(model, PROMPTS, SIZES)
    with torch.no_grad():
        want = model(**inputs)
        with tokprune.compress(model, method, **options) as trace:
            got = model(**inputs)
            step = {
                "input_ids": torch.tensor([[5], [6]]),
                "attention_mask": torch.nn.functional.pad(
                    inputs["attention_mask"], (0, 1), value=1
                ),
            }
            after = model(**step, past_key_values=got.past_key_values).logits
        plain = model(**step, past_key_values=want.past_key_values).logits
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(after, plain)
    last = trace.last
    assert last.layers[-1].lengths == last.original_lengths
    assert "nothing" in trace.summary().lower()  # and it says so loudly
