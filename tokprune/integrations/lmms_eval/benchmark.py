"""lmms-eval's tasks as a benchmark: items with images and questions, for matching budgets, for
counting, and for the report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.sweep.identity import digest
from tokprune.inputs.pictures import opened
from tokprune.integrations.lmms_eval.tasks.loading import LoadedTasks

if TYPE_CHECKING:
    from PIL import Image

#: fields of a document that name its image, the first one found is taken
_IMAGE_FIELDS = (
    "image_id", "imageId", "img_id", "image_name", "image_source", "image_file", "img_path",
    "ucsf_document_id", "docId",
)  # fmt: skip


def item_id(task: str, doc_id: Any) -> str:
    """The id of a document in rows: ``task:number``."""
    return f"{task}:{doc_id}"


class LmmsBenchmark(Benchmark):
    """Documents of lmms-eval tasks. All tasks are in the headline; named groups and tags are
    groups. ``limit`` counts per task, as in lmms-eval.

    ``answers`` of an item are empty where a task's target is not text.
    """

    splits = ()
    name = "lmms-eval"

    def __init__(self, loaded: LoadedTasks) -> None:
        self._tasks = loaded.tasks
        self.tasks = self.headline = tuple(loaded.tasks)
        self.groups = {name: tuple(tasks) for name, tasks in loaded.groups.items()}
        self.version = digest(dict(loaded.versions))[:32]

    def items(
        self, split: str | None = None, tasks: Sequence[str] | None = None, limit: int | None = None
    ) -> list[Item]:
        if split is not None:
            raise ValueError(f"split={split!r}: lmms-eval's tasks name their split themselves")
        found = []
        for name, task in self._tasks.items():
            if tasks is not None and name not in tasks:
                continue
            # without images, which need not be decoded for this
            docs = getattr(task, "eval_docs_no_media", None) or task.eval_docs
            found += [
                self._item(name, task, doc_id, doc)
                for doc_id, doc in enumerate(itertools.islice(docs, limit))
            ]
        return found

    def image(self, item: Item) -> Image.Image:
        """The one image of an item.

        Raises:
            ValueError: a document without an image, with several, or with a video.
        """
        task, doc_id = self._tasks[item.task], item.meta["doc_id"]
        visuals = task.doc_to_visual(task.eval_docs[doc_id])
        images = visuals if isinstance(visuals, (list, tuple)) else [visuals]
        if len(images) != 1 or not hasattr(images[0], "convert"):
            raise ValueError(f"item {item.id!r}: has no single image")
        with opened(images[0], f"item {item.id!r}") as image:
            return image.convert("RGB")  # as lmms-eval's models do: what they see

    @staticmethod
    def _item(name: str, task: Any, doc_id: int, doc: Mapping[str, Any]) -> Item:
        text = task.doc_to_text(doc)
        return Item(
            id=item_id(name, doc_id),
            task=name,
            image_id=_image_id(name, task, doc_id, doc),
            question=text if isinstance(text, str) else str(text),
            answers=_answers(task, doc),
            meta={"doc_id": doc_id},
        )


def _answers(task: Any, doc: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        target = task.doc_to_target(doc)
        if isinstance(target, int) and task.config.doc_to_choice is not None:
            target = task.doc_to_choice(doc)[target]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return ()  # some tasks have no target of a single document; they score by other means
    targets = target if isinstance(target, (list, tuple)) else [target]
    plain = [str(one) for one in targets if isinstance(one, (str, int, float))]
    return tuple(dict.fromkeys(text for text in plain if text))


def _image_id(name: str, task: Any, doc_id: int, doc: Mapping[str, Any]) -> str:
    """What is equal for questions about one image, as far as the document tells."""
    fields = ("question_id",) if name == "mme" else _IMAGE_FIELDS
    for field in fields:  # both questions about an image of MME carry its name as their id
        value = doc.get(field)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            return f"{str(task.config.dataset_path).rsplit('/', 1)[-1]}:{value}"
    return item_id(name, doc_id)
