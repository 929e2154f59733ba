"""Offloaded caches: what is decoded is what a cache on the device gives.

Fetching ahead needs a GPU's streams; here they are stand-ins that count who waits for them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_cases import METHODS, SHAPES, case_of

from tokprune.errors import UnsupportedModelError
from tokprune.testing import assert_same_logits, continuation_tokens
from tokprune.testing.generated import forced_logits


class Stream:
    """On one device everything is in order."""

    waits = 0

    def wait_stream(self, other: Any) -> None:
        Stream.waits += 1

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def _streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream())


@pytest.mark.parametrize(
    "family",
    ["llava-1.5", *(pytest.param(f, marks=pytest.mark.full) for f in ("qwen2.5-vl", "gemma3"))],
)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "evs"])
def test_equals_a_cache_on_the_device(method: str, family: str) -> None:
    case = case_of(method, family, SHAPES["ragged"])
    inputs, tokens = case.inputs(), continuation_tokens(4, 3)
    try:
        with case.compress():
            want = forced_logits(case.model, inputs, tokens)
    except (UnsupportedModelError, ValueError) as refusal:
        pytest.skip(str(refusal))
    with case.compress():
        got = forced_logits(case.model, inputs, tokens, cache_implementation="offloaded")
    assert torch.equal(got, want)


@pytest.mark.parametrize("method", ["divprune", "fastv-compact", "mustdrop"])
def test_static_ones_too(method: str) -> None:
    case = case_of(method, "llava-1.5", SHAPES["ragged"])
    inputs, tokens = case.inputs(), continuation_tokens(4, 3)
    with case.compress():
        want = forced_logits(case.model, inputs, tokens)
        got = forced_logits(case.model, inputs, tokens, cache_implementation="offloaded_static")
    assert_same_logits(got, want)


def test_scores_and_policies_wait_for_what_is_fetched_ahead() -> None:
    case = case_of("mustdrop", "llava-1.5", SHAPES["single"])
    with case.compress():
        Stream.waits = 0
        forced_logits(case.model, case.inputs(), continuation_tokens(1, 2))
        assert not Stream.waits
        forced_logits(
            case.model, case.inputs(), continuation_tokens(1, 2), cache_implementation="offloaded"
        )
    layers = len(case.model.model.language_model.layers)
    assert Stream.waits > 3 * layers  # one of ours beside those of every update
