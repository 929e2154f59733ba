"""Masked oracle on the original package: pruning method × tiling × attention backend × batch.

Dropping tokens equals the unpruned model with their keys hidden, in the prefill, in every decode
step, and in what ``generate`` answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods_table import CORE_PRUNING, PRUNING
from original import answer, compressed_logits, oracle_logits

import tokprune
from tokprune.testing.oracle import assert_same_logits

NEW = 5  # tokens to generate: the first comes from the prefill, the others from decode steps


@torch.no_grad()
def check(model: Any, inputs: dict[str, Any], case: str, window: int | None = None) -> None:
    method, options = PRUNING[case]
    with tokprune.compress(model, method, **options) as trace:
        tokens = answer(model, inputs, NEW)
        assert tokens.shape[1] == NEW
        assert trace.decode_steps == NEW - 1
        got = compressed_logits(model, inputs, tokens[:, :-1])
    assert trace.last is not None
    assert sum(map(sum, trace.last.layers[-1].counts)) < sum(
        len(image.columns) for image in trace.last.images
    ), "the method dropped nothing: the comparison would show nothing"
    want = oracle_logits(model, inputs, trace.last, tokens[:, :-1], window)
    assert_same_logits(got, want)
    assert torch.equal(want.argmax(-1), tokens)


@pytest.mark.parametrize("prompt", ["one", "ragged"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["square", "anyres"])
@pytest.mark.parametrize("case", PRUNING)
def test_equals_unpruned_model_with_dropped_keys_hidden(
    original: Callable[..., Any], case: str, name: str, attention: str, prompt: str
) -> None:
    form = original(name, attention)
    check(form.model, form.inputs(prompt), case)


@pytest.mark.parametrize("case", CORE_PRUNING)
def test_eager_mistral_with_a_sliding_window(original: Callable[..., Any], case: str) -> None:
    form = original("anyres-mistral")
    model = form.build("eager", sliding_window=24)
    check(model, form.inputs("ragged"), case, window=24)


def test_sdpa_masks_of_the_old_mistral_leave_the_window_out(original: Callable[..., Any]) -> None:
    form = original("anyres-mistral")
    model, inputs = form.build("sdpa", sliding_window=24), form.inputs("one")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, form.model(**inputs).logits)
    check(model, inputs, "fastv")


@pytest.mark.parametrize("case", ["flowcut-paper", "todre-k-center", "fastv"])
def test_linear_rope_scaling(original: Callable[..., Any], case: str) -> None:
    """With 'preserve', decode positions lie beyond the keys that a layer holds."""
    form = original("square")
    model = form.build("sdpa", rope_scaling={"type": "linear", "factor": 4.0})
    check(model, form.inputs("ragged"), case)


@pytest.mark.parametrize("case", CORE_PRUNING)
@pytest.mark.parametrize("merge", ["flat", "spatial"])
def test_tiles_without_newlines(original: Callable[..., Any], merge: str, case: str) -> None:
    form = original("anyres")
    model = form.build(mm_patch_merge_type=merge)
    check(model, form.inputs("ragged"), case)


def test_at_a_size_where_the_two_packages_crop_differently(original: Callable[..., Any]) -> None:
    """The original cuts int(height · scale) where transformers rounds to 7 digits first: 14.99…97
    rows are 14 here and 15 there, so prompts differ in length, compressed or not."""
    form = original("anyres")
    height, width = form.known["rounding"]["size"]
    inputs = form.inputs("one")
    tiles = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    inputs.update(images=[tiles], image_sizes=[(width, height)])
    check(form.model, inputs, "flowcut")
    with tokprune.compress(form.model, "random", keep=10) as trace, torch.no_grad():
        form.model(**inputs)
    assert trace.last is not None
    assert len(trace.last.images[0].columns) == 134
    assert form.known["rounding"]["tokens"] == 148
