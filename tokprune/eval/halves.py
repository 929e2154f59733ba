"""Images put aside, so that what was chosen on some is reported on others."""

from __future__ import annotations

import random
from collections.abc import Iterable


def share_of_images(questions: Iterable[tuple[str, str]], share: float, seed: int) -> set[str]:
    """Images to put aside, drawn at random, with all of their questions.

    Images whose questions are of the same tasks are drawn from together, so that both sides have
    about as much of every task.

    Args:
        questions: (image, task) of each.
        share: of the images, between 0 and 1.
        seed: of the draw, which does not depend on the order of the questions.

    Raises:
        ValueError: a side would lack a task that the other has.
    """
    tasks: dict[str, set[str]] = {}
    for image, task in questions:
        tasks.setdefault(image, set()).add(task)
    groups: dict[tuple[str, ...], list[str]] = {}
    for image in sorted(tasks):
        groups.setdefault(tuple(sorted(tasks[image])), []).append(image)
    rng = random.Random(f"tokprune {seed}")
    aside: set[str] = set()
    due = 0.0  # what rounding owes, so that many small groups come to the share as well
    for _, images in sorted(groups.items()):
        rng.shuffle(images)
        due += share * len(images)
        number = max(0, min(len(images), round(due)))
        due -= number
        aside.update(images[:number])
    every = {task for own in tasks.values() for task in own}
    for side in (aside, tasks.keys() - aside):
        lacking = every - {task for image in side for task in tasks[image]}
        if lacking:
            raise ValueError(
                f"{len(tasks)} images are too few to put {share:.0%} of them aside: one side would "
                f"have no question of task {min(lacking)!r}"
            )
    return aside
