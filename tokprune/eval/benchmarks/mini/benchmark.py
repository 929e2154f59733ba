"""Scenes and questions as a benchmark with fixed splits."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from PIL import Image

from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.benchmarks.mini.questions import GROUPS, TASKS, ask
from tokprune.eval.benchmarks.mini.render import render
from tokprune.eval.benchmarks.mini.scene import make_scene, random_state

#: name → (seed of its scenes, questions per task); training uses seeds 1 to 3
SPLITS = {"quick": (101, 30), "test": (102, 200), "validation": (103, 60)}
#: at most this many questions about one scene
PER_SCENE = 4


class MiniBenchmark(Benchmark):
    """``mini``: 12 types of question about scenes of 10 to 20 objects on clutter.

    Splits: ``quick`` (30 questions per type, for demonstrations), ``test`` (200), ``validation``
    (60, for choices made while developing). The questions of a split take turns over the types, so
    that any prefix is balanced. Everything follows from the split's seed; nothing is downloaded.
    """

    name = "mini"
    version = "1"
    splits = tuple(SPLITS)
    tasks = TASKS
    groups = GROUPS
    #: types that the embedded model answers correctly in at least 80 % of the test split; ``count``
    #: and ``relation`` stay below that and are reported beside them
    headline = tuple(task for task in TASKS if task not in ("count", "relation"))
    max_new_tokens = 8

    def items(
        self, split: str | None = None, tasks: Sequence[str] | None = None, limit: int | None = None
    ) -> list[Item]:
        split, wanted = self.selected(split, tasks, limit)
        chosen = [item for item in _all_items(split) if item.task in wanted]
        return chosen[:limit]

    def image(self, item: Item) -> Image.Image:
        return render(make_scene(*item.meta["scene"]))


@functools.cache
def _all_items(split: str) -> tuple[Item, ...]:
    """Questions of a split, one of each type in turn."""
    seed, number = SPLITS[split]
    found: dict[str, list[Item]] = {task: [] for task in TASKS}
    scene_number = 0
    while any(len(items) < number for items in found.values()):
        scene = make_scene(seed, scene_number)
        rng = random_state(scene.key, "questions")
        # the types that lack most come first
        order = sorted(rng.permutation(list(TASKS)), key=lambda task: len(found[task]))
        chosen = 0
        for task in map(str, order):
            if chosen == PER_SCENE:
                break
            if len(found[task]) == number or (pair := ask(scene, task, rng)) is None:
                continue
            question, answer = pair
            image = f"{split}-{scene_number:05d}"
            found[task].append(
                Item(
                    id=f"{task}-{image}",
                    task=task,
                    image_id=image,
                    question=question,
                    answers=(answer,),
                    meta={"scene": [seed, scene_number]},
                )
            )
            chosen += 1
        scene_number += 1
    return tuple(found[task][i] for i in range(number) for task in TASKS)
