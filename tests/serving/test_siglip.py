"""A tower without class token."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving_case import ARCHITECTURE, ask_questions, furthest, in_transformers, questions
from siglip_model import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make(tmp_path_factory.mktemp("siglip") / "model"))


@pytest.mark.parametrize("method", ["divprune", "fastervlm", "visionzip"])
def test_as_in_transformers(method: str, folder: str, engines: Any) -> None:
    text, asked = json.dumps({"method": method, "keep": 20}), questions()[:12]
    got = ask_questions(engines(text, folder, ARCHITECTURE), asked)
    want = in_transformers(folder, text, [(question, image) for question, _, image in asked])
    assert [own.prompt for own in got] == [own.prompt for own in want]
    assert [own.kept for own in got] == [own.kept for own in want]
    assert max(furthest(a, b) for a, b in zip(got, want)) < 1e-4
