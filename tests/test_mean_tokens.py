"""What a method says of its mean over the decoder's layers is what is measured."""

from typing import Any

import pytest
import torch
from tiny import llava, make_inputs

import tokprune
from tokprune.methods import available_methods, make_method
from tokprune.methods.base import PRESET_MODELS, preset_mean

CASES: dict[str, dict[str, Any]] = {
    "divprune": {"keep": 7}, "random": {"keep": 0.3}, "fastv": {"keep": 7, "prune_before": 3},
    "pyramiddrop": {"keep": 4, "prune_before": (2, 4, 6)},
    "sparsevlm": {"keep": (20, 9), "prune_before": (2, 5)},
    "transprune": {"keep": 4, "prune_before": (2, 3, 5), "transition_layers": (1, 2, 3, 4)},
    "v2drop": {"ratios": (0.5, 0.5, 0.0), "prune_before": (2, 4, 6)},
    "dart": {"keep": 9, "prune_before": 3}, "priortr": {"keep": 5},
    "clse": {"keep": 4, "prune_before": (1, 3, 6)},
    "sieve": {"keep": (12, 3), "prune_before": (2, 5)},
    "tops": {"keep": 8, "prune_before": (3, 6)}, "vscan": {"keep": 6, "prune_before": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_mean_is_measured(name: str) -> None:
    model, method = llava(), make_method(name, **CASES[name])
    inputs = make_inputs(model, [[4, "image", 6]])
    with tokprune.compress(model, method) as trace, torch.no_grad():
        model(**inputs)
    layers = [sum(own.counts[0]) for own in trace.last.layers]
    assert method.mean_tokens(36, len(layers)) == sum(layers) / len(layers)


def test_methods_that_the_image_decides_say_nothing() -> None:
    for method in (
        make_method("sparsevlm", keep=None),
        make_method("prumerge"),
        make_method("trim"),
    ):
        assert method.mean_tokens(576, 32) is None
    assert make_method("fastv", keep=4, prune_before=20).mean_tokens(36, 8) is None


def test_nominal_budgets_are_told_apart() -> None:
    found = {
        (name, preset.model, preset.budget): preset_mean(cls, preset)
        for name, cls in available_methods().items()
        for preset in cls.presets
    }
    for key, mean in {
        ("tops", "llava-1.5", 128): 152, ("priortr", "llava-1.5", 192): 228,
        ("clse", "llava-1.5", 192): 208, ("clse", "llava-1.5", 64): 81,
        ("v2drop", "llava-1.5", "50/50/100%"): 203, ("fastv", "llava-1.5", 192): 192,
        ("divprune", "llava-next", 320): 320,
    }.items():  # fmt: skip
        assert round(found[key] or 0) == mean, key
    assert all(mean is None for (_, model, _), mean in found.items() if model not in PRESET_MODELS)
