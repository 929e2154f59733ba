"""Questions to choose by, and others, about other images, to report on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tokprune.eval.benchmarks import load_benchmark
from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.halves import share_of_images
from tokprune.eval.sweep.builtin import BuiltinHarness
from tokprune.eval.tune.settings import TuneSettings


@dataclass(frozen=True)
class Questions:
    """Both sets. ``how``: in what they differ, in words."""

    choosing: BuiltinHarness
    held_out: BuiltinHarness
    how: str

    @classmethod
    def of(cls, settings: TuneSettings) -> Questions:
        """Load the benchmark, and leave out what does not count in its macro average.

        Raises:
            ValueError: no such benchmark, split or task; no question is left; or both sets have an
                image in common.
            OSError: unreadable files.
        """
        sweep = settings.sweeping("none")
        benchmark = load_benchmark(sweep.benchmark, lazy=True, **sweep.file_options())
        if sweep.max_new_tokens is not None:
            benchmark.max_new_tokens = sweep.max_new_tokens
        tasks = list(sweep.tasks or benchmark.headline or benchmark.tasks)
        split, held_out = _names(benchmark, settings)
        if isinstance(held_out, str):
            first = benchmark.items(split, tasks, settings.limit)
            second = benchmark.items(held_out, tasks, settings.held_out_limit)
            shared = {item.image_id for item in first} & {item.image_id for item in second}
            if shared:
                raise ValueError(
                    f"held_out={held_out!r}: {len(shared)} images are those of split {split!r} as "
                    "well; it should be a split of other images, or a share such as 1/2"
                )
            names = split, held_out
            how = f"split {held_out!r}"
        else:
            every = benchmark.items(split, tasks, None)
            aside = share_of_images(
                [(item.image_id, item.task) for item in every], held_out, settings.seed
            )
            first = _balanced([i for i in every if i.image_id not in aside], settings.limit)
            second = _balanced([i for i in every if i.image_id in aside], settings.held_out_limit)
            where = "" if split is None else f" of split {split!r}"
            how = f"{held_out:.0%} of the images{where}, put aside at random (seed {settings.seed})"
            names = (f"{split}: choosing", f"{split}: held out")
        for which, items in (("split", first), ("held_out", second)):
            if not items:
                raise ValueError(f"{which}: no question of benchmark {benchmark.name} is left")
        return cls(
            BuiltinHarness(benchmark, in_turns(first, settings.seed), names[0]),
            BuiltinHarness(benchmark, list(second), names[1]),
            how,
        )


def _names(benchmark: Benchmark, settings: TuneSettings) -> tuple[str | None, str | float]:
    """The split to choose by, and the one to report on, or a share of the first's images."""
    splits = benchmark.splits
    split = settings.split
    if split is None:
        free = [name for name in splits if name != settings.held_out]
        split = "validation" if "validation" in free else next(iter(free), None)
    held_out = settings.held_out
    if held_out is None:
        free = [name for name in splits if name != split]
        held_out = "test" if "test" in free else next(iter(free), 0.5)
    if held_out == split and split is not None:
        raise ValueError(
            f"held_out={held_out!r} is the split to choose by; it should be another one"
            + (f" ({', '.join(n for n in splits if n != split)})" if len(splits) > 1 else "")
            + ", or a share of the images, such as 1/2"
        )
    return split, held_out


def in_turns(items: Sequence[Item], seed: int) -> list[Item]:
    """Questions in an order of chance in which the tasks take turns: any beginning is balanced."""
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(item)
    rng = random.Random(f"tokprune {seed}")
    for own in by_task.values():
        rng.shuffle(own)
    longest = max(map(len, by_task.values()), default=0)
    return [own[n] for n in range(longest) for own in by_task.values() if n < len(own)]


def _balanced(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most so many, balanced over the tasks, in the order in which they are."""
    if limit is None or len(items) <= limit:
        return list(items)
    taken = {item.id for item in in_turns(items, 0)[:limit]}
    return [item for item in items if item.id in taken]
