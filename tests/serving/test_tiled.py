"""Models that cut images into tiles: stitched, unpadded, with newlines; and methods by tile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving_case import ask, ask_questions, furthest, in_transformers, questions, request
from tiled_models import CLASSES, make

KINDS = ("llava_next", "llava_onevision")
SETTINGS: dict[str, dict[str, Any]] = {
    "divprune": {"method": "divprune", "keep": 0.1},
    "visionzip": {"method": "visionzip", "keep": 16},
    "fastervlm": {"method": "fastervlm", "keep": 16, "order": "spatial"},
    "pool": {"method": "pool", "keep": 16},
}
#: (height, width): wide, tall, square, and with padding at the edges of crops
SIZES = ((100, 300), (384, 192), (192, 192), (150, 420))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiled")
    return {kind: make(kind, root / kind) for kind in KINDS}


def images(kind: str) -> list[Any]:
    found = []
    sizes = [*SIZES[:2], (700, 760)] if kind == "llava_onevision" else SIZES
    for number, (height, width) in enumerate(sizes):
        question, _, image = questions()[4 * number]
        found.append((question, f"{height}×{width}", image.resize((width, height))))
    return found


@pytest.mark.parametrize(
    ("kind", "name"),
    [("llava_next", name) for name in SETTINGS] + [("llava_onevision", "divprune"),
                                                   ("llava_onevision", "visionzip")],
)  # fmt: skip
def test_as_in_transformers(kind: str, name: str, folders: Any, engines: Any) -> None:
    text, folder = json.dumps(SETTINGS[name]), str(folders[kind])
    most = {"image": 2, "video": 0} if kind == "llava_onevision" else {"image": 2}
    architecture = f"Tokprune{CLASSES[kind][0]}"
    llm = engines(text, folder, architecture, max_model_len=3500, limit_mm_per_prompt=most)
    got = ask_questions(llm, images(kind))
    want = in_transformers(folder, text, [(q, image) for q, _, image in images(kind)])
    assert [own.prompt for own in got] == [own.prompt for own in want]
    assert [own.kept for own in got] == [own.kept for own in want]
    assert max(furthest(a, b) for a, b in zip(got, want)) < 1e-4
    assert [own.text for own in got] == [own.text for own in want]
    # together, in one call of the tower where the cache has none of them
    again = ask(llm, [request(question, image.rotate(180)) for question, _, image in images(kind)])
    alone = in_transformers(folder, text, [(q, image.rotate(180)) for q, _, image in images(kind)])
    assert max(furthest(a, b) for a, b in zip(again, alone)) < 1e-4
