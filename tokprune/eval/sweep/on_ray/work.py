"""What workers are to answer: batches, each with the trials that are open on it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokprune.eval.benchmarks.base import Item
from tokprune.eval.sweep.batches import chunks, is_open
from tokprune.eval.sweep.harness import OpenTrial

#: so many lost workers are the batch's own doing
MOST_LOSSES = 3


@dataclass(eq=False)
class Shard:
    """A batch, and the trials that nobody answers on it yet. One worker has them all, so that the
    encoder runs once for them."""

    #: position of the first item among all
    start: int
    items: Sequence[Item]
    open: deque[OpenTrial]
    #: workers that were lost while they answered it
    losses: int = 0

    @property
    def stop(self) -> int:
        """Position after the last item."""
        return self.start + len(self.items)

    @property
    def questions(self) -> str:
        return ", ".join(item.id for item in self.items)


class Work:
    """All that is open: what nobody has in hand, and what some worker has."""

    def __init__(self, trials: Sequence[OpenTrial], items: Sequence[Item], size: int) -> None:
        """Args:
        trials: what is open; repetitions for the noise floor have batches of their own and come
            first.
        items: of the benchmark.
        size: questions in a batch of all other trials.
        """
        noise = [([task], task.trial.entry["batch_size"]) for task in trials if _noise(task)]
        main = [task for task in trials if not _noise(task)]
        self.queue: deque[Shard] = deque()
        self.held: list[Shard] = []
        #: batches that nobody is to try again, with the trial and the worker that they ended with
        self.given_up: list[tuple[Shard, str]] = []
        for tasks, wanted in [*noise, (main, size)]:
            for number, batch in enumerate(chunks(items, wanted)):
                open_here = deque(_part(task, batch) for task in tasks if is_open(task, batch))
                if open_here:
                    self.queue.append(Shard(number * wanted, batch, open_here))
        #: of the start, as many calls of a worker as answer everything
        self.pieces = sum(len(shard.open) for shard in self.queue)

    @property
    def done(self) -> bool:
        return not self.queue and not self.held

    def take(self) -> Shard | None:
        """A shard for a worker that has none; None where there is nothing to do. At the end it is
        half of the trials of the fullest batch, whose encoder then runs a second time."""
        if not self.queue:
            fullest = max(self.held, key=lambda shard: len(shard.open), default=None)
            if fullest is None or not fullest.open:
                return None
            half = [fullest.open.pop() for _ in range((len(fullest.open) + 1) // 2)]
            self.queue.append(replace(fullest, open=deque(reversed(half))))
        self.held.append(self.queue.popleft())
        return self.held[-1]

    def finish(self, shard: Shard) -> None:
        """Nothing of a shard is open, and nothing in flight."""
        self.held.remove(shard)

    def put_back(self, shard: Shard, task: OpenTrial, how: str) -> bool:
        """Its worker was lost while it answered ``task``; ``how``: where and why. False where the
        batch is given up."""
        self.held.remove(shard)
        if task.trial.runs:  # it may have been dropped meanwhile
            shard.open.appendleft(task)
        if not shard.open:
            return True
        shard.losses += 1
        if shard.losses >= MOST_LOSSES:
            self.given_up.append((shard, f"{task.trial.id} {how}"))
            return False
        self.queue.appendleft(shard)
        return True

    def drop(self, trial: str) -> None:
        """A trial is not to be answered any more."""
        for shard in [*self.queue, *self.held]:
            shard.open = deque(task for task in shard.open if task.trial.id != trial)
        self.queue = deque(shard for shard in self.queue if shard.open)


def _noise(task: OpenTrial) -> bool:
    return bool(task.trial.entry["noise"])


def _part(task: OpenTrial, items: Sequence[Item]) -> OpenTrial:
    """What a trial has not answered of a batch."""
    return OpenTrial(
        task.trial, {item.id: task.rows[item.id] for item in items if item.id in task.rows}
    )
