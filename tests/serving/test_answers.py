"""Answers in vLLM are those of tokprune in transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving_case import (
    ask_questions,
    furthest,
    model_of,
    not_numbers,
    questions,
    reference,
)

#: of methods at the language-model input, at the tower's feature layer, and looking at its last one
SETTINGS: dict[str, dict[str, Any]] = {
    "divprune": {"method": "divprune", "keep": 64},
    "visionzip": {"method": "visionzip", "keep": 64},
    "todre": {"method": "todre", "keep": 64, "stage2": False},
    "prunesid": {"method": "prunesid", "keep": 64},
    "pool": {"method": "pool", "keep": 64},
}
#: of log-probabilities; where the first token is decided by less, texts say little
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", SETTINGS)
def test_as_in_transformers(name: str, engines: Any) -> None:
    text = json.dumps(SETTINGS[name])
    got, want = ask_questions(engines(text)), reference(text)
    assert [own.text for own in got] == [own.text for own in want]
    assert [own.prompt for own in got] == [own.prompt for own in want]
    assert max(own.prompt for own in got) < 80
    assert [own.kept for own in got] == [own.kept for own in want]
    assert max(furthest(a, b) for a, b in zip(got, want)) < TOLERANCE


@pytest.mark.parametrize("text", ["", '{"method": "none"}'])
def test_switched_off(text: str, engines: Any) -> None:
    """vLLM's own architecture with the plug-in installed, and ours without a method."""
    got, want = ask_questions(engines(text)), reference("{}")
    assert [own.text for own in got] == [own.text for own in want]
    assert [own.prompt for own in got] == [own.prompt for own in want]
    assert min(own.prompt for own in got) > 576
    assert max(furthest(a, b) for a, b in zip(got, want)) < TOLERANCE


def test_features_that_are_no_numbers(engines: Any) -> None:
    """They cannot be ranked, and do not end the server: as many rows as are waited for, and a
    word."""
    text = json.dumps(SETTINGS["visionzip"])
    llm = engines(text, max_num_seqs=2)  # of its own: NaN stays in vLLM's caches
    with not_numbers(model_of(llm), "multi_modal_projector"):
        got = ask_questions(llm, questions()[:2])
    assert [own.prompt for own in got] == [own.prompt for own in reference(text)[:2]]
    assert [own.kept for own in got] == [[0] * 64] * 2
