"""Clips and questions as a benchmark with fixed splits."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.benchmarks.mini_video.clip import FRAMES, GROUPS, LEAST_FRAMES, TASKS, Clip
from tokprune.eval.benchmarks.mini_video.make import make_clip
from tokprune.eval.benchmarks.mini_video.render import render

#: name → (seed of its clips, questions per task); seeds 1 to 3 are for training
SPLITS = {"quick": (201, 30), "test": (202, 200), "validation": (203, 60)}


class MiniVideoBenchmark(Benchmark):
    """``mini-video``: 5 types of question about clips, one question a clip.

    No frame alone gives an answer away better than chance (``CHANCE`` in ``clip``). Splits:
    ``quick`` (30 questions per type), ``test`` (200), ``validation`` (60). The questions of a split
    take turns over the types, so that any prefix is balanced. Everything follows from the split's
    seed; nothing is downloaded. ``direction`` stays out of the headline: the embedded model is at
    best a little better than a guess at it.

    Args:
        frames: of a clip, at least 4.

    Raises:
        ValueError: too few frames.
    """

    name = "mini-video"
    media = "video"
    splits = tuple(SPLITS)
    tasks = TASKS
    groups = GROUPS
    headline = tuple(task for task in TASKS if task != "direction")
    max_new_tokens = 8

    def __init__(self, frames: int = FRAMES) -> None:
        if frames < LEAST_FRAMES:
            raise ValueError(f"frames={frames} should be at least {LEAST_FRAMES}")
        self.frames = frames
        self.version = "1" if frames == FRAMES else f"1, {frames} frames"

    def items(
        self, split: str | None = None, tasks: Sequence[str] | None = None, limit: int | None = None
    ) -> list[Item]:
        split, wanted = self.selected(split, tasks, limit)
        chosen = [
            (number, task)
            for number in range(SPLITS[split][1])
            for task in self.tasks
            if task in wanted
        ]
        return [self._item(split, number, task) for number, task in chosen[:limit]]

    def image(self, item: Item) -> Image.Image:
        return super().image(item)

    def video(self, item: Item) -> list[Image.Image]:
        return render(self.clip(item))

    def clip(self, item: Item) -> Clip:
        """The scene behind an item: who is where in which frame."""
        seed, number = item.meta["clip"]
        return make_clip(seed, number, item.task, self.frames)

    def _item(self, split: str, number: int, task: str) -> Item:
        seed = SPLITS[split][0]
        clip = make_clip(seed, number, task, self.frames)
        name = f"{task}-{split}-{number:05d}"
        return Item(
            id=name,
            task=task,
            image_id=name,
            question=clip.question,
            answers=(clip.answer,),
            meta={"clip": [seed, number]},
        )
