"""The benchmark ``mini`` as lmms-eval tasks: its test split, one task per type of question.

The YAML files in ``tasks/`` name these functions. Nothing is downloaded: questions are written to
a file in the cache of ``datasets`` when a task is first loaded, images are drawn when asked for.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokprune.eval.benchmarks.base import Item
from tokprune.eval.benchmarks.mini import MiniBenchmark

if TYPE_CHECKING:
    from PIL import Image

SPLIT = "test"
_BENCHMARK = MiniBenchmark()

Doc = Mapping[str, Any]


def __getattr__(name: str) -> Any:
    if name == "dataset_kwargs":  # made when a task is loaded, not when this module is
        return _dataset_kwargs()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _dataset_kwargs() -> dict[str, Any]:
    """Arguments of ``datasets.load_dataset("json", …)``: a file of questions per type, which are
    the "splits" of the data set. The files are written where they are missing or different."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "tokprune" / f"mini-{_BENCHMARK.version}"
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for task in _BENCHMARK.tasks:
        path = folder / f"{SPLIT}-{task}.jsonl"
        lines = (json.dumps(_doc(item)) + "\n" for item in _BENCHMARK.items(SPLIT, [task]))
        _write("".join(lines), path)
        files[task] = str(path)
    return {"data_files": files}


def _write(text: str, path: Path) -> None:
    """Several processes may do this at once, with the same text."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _doc(item: Item) -> dict[str, Any]:
    """An item as a document; ``item_of`` turns it back."""
    return {
        "id": item.id, "task": item.task, "image_id": item.image_id, "question": item.question,
        "answers": list(item.answers), "scene": list(item.meta["scene"]),
    }  # fmt: skip


def item_of(doc: Doc) -> Item:
    return Item(
        id=doc["id"],
        task=doc["task"],
        image_id=doc["image_id"],
        question=doc["question"],
        answers=tuple(doc["answers"]),
        meta={"scene": list(doc["scene"])},
    )


def doc_to_visual(doc: Doc) -> list[Image.Image]:
    return [_BENCHMARK.image(item_of(doc))]


def doc_to_text(doc: Doc) -> str:
    question: str = doc["question"]
    return question + _BENCHMARK.prompt_suffix


def doc_to_target(doc: Doc) -> str:
    answer: str = doc["answers"][0]
    return answer


def process_results(doc: Doc, results: list[str]) -> dict[str, float]:
    """``accuracy``: 1 for a correct answer, else 0, as the benchmark itself scores."""
    return {"accuracy": _BENCHMARK.score(item_of(doc), results[0])}
