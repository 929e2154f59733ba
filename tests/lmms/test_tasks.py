"""The embedded benchmark as tasks of lmms-eval: complete, local, the same questions and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from lmms_eval.tasks import get_task_dict
from requests_of import BENCHMARK

from tokprune.integrations.lmms_eval.tasks import TASKS, mini


@pytest.fixture(scope="module")
def loaded(tasks: Any) -> dict[str, Any]:
    return get_task_dict(["tokprune_mini_all"], tasks, "simple")


def configuration(name: str) -> Any:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return yaml.load((TASKS / name).read_text(), Loader)


def test_a_task_for_every_type_and_groups_of_them(tasks: Any) -> None:
    every = [f"tokprune_mini_{task}" for task in BENCHMARK.tasks]
    assert set(tasks.all_tasks) == {*every, "tokprune_mini", "tokprune_mini_all"}
    headline = [f"tokprune_mini_{task}" for task in BENCHMARK.headline]
    assert configuration("tokprune_mini.yaml")["task"] == headline
    assert sorted(configuration("tokprune_mini_all.yaml")["task"]) == sorted(every)


def test_versions_are_the_benchmark_s() -> None:
    for name in ("_mini", "tokprune_mini.yaml", "tokprune_mini_all.yaml"):
        assert str(configuration(name)["metadata"]["version"]) == BENCHMARK.version
    assert configuration("_mini")["generation_kwargs"]["max_new_tokens"] == BENCHMARK.max_new_tokens


def test_documents_are_the_items_of_the_test_split(loaded: dict[str, Any]) -> None:
    (group,) = loaded.values()
    for name, task in group.items():
        kind = name.removeprefix("tokprune_mini_")
        docs = task.test_docs()
        assert [mini.item_of(doc) for doc in docs] == BENCHMARK.items("test", [kind])
        item = mini.item_of(docs[0])
        (image,) = task.doc_to_visual(docs[0])
        assert image.tobytes() == BENCHMARK.image(item).tobytes()
        assert task.doc_to_text(docs[0]) == item.question + BENCHMARK.prompt_suffix
        assert task.process_results(docs[0], [f" {item.answers[0].upper()}. "]) == {"accuracy": 1.0}
        assert task.process_results(docs[0], ["no such answer"]) == {"accuracy": 0.0}


def test_damaged_data_are_written_anew() -> None:
    mini._dataset_kwargs.cache_clear()
    files = mini.dataset_kwargs["data_files"]
    path = Path(files["color"])
    assert path.is_relative_to(datasets.config.HF_DATASETS_CACHE)
    text = path.read_text()
    path.write_text("{}\n")
    mini._dataset_kwargs.cache_clear()
    assert mini.dataset_kwargs["data_files"] == files
    assert path.read_text() == text
    assert sorted(path.parent.iterdir()) == sorted(map(Path, files.values()))
