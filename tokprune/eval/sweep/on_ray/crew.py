"""The workers of one sweep: who has what in hand, and what becomes of it when one is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokprune.eval.sweep.batches import NoRoomError, unreachable
from tokprune.eval.sweep.harness import OpenTrial, Step, TrialsFailedError
from tokprune.eval.sweep.on_ray.cluster import Cluster, LostError
from tokprune.eval.sweep.on_ray.work import Shard, Work
from tokprune.eval.sweep.settings import Settings

#: a place whose workers are lost so often in a row, without an answer between, is not filled again
MOST_LOST = 5
#: seconds for which a sweep waits while Ray has no room for any worker
PATIENCE = 600.0
#: seconds between looks at how long that is
_LOOK = 10.0


@dataclass(frozen=True)
class Orders:
    """What every worker is started with, and what it has to be."""

    settings: Settings
    gallery: tuple[set[str], set[str]]
    device: str
    #: of torch on a CPU
    threads: int | None
    #: tokprune, code, benchmark, model and dtype of this process
    wanted: Mapping[str, str]


@dataclass(eq=False)
class Hand:
    """A worker and what it does."""

    actor: Any
    #: workers lost in this place since its last answer
    lost: int
    #: what is done with the result of the call in flight
    then: Callable[[Hand, Any], Sequence[Step]]
    address: str = "a node"
    placed: bool = False
    shard: Shard | None = None
    task: OpenTrial | None = None


class Crew:
    """Has all of ``work`` done by ``size`` workers."""

    def __init__(self, cluster: Cluster, work: Work, orders: Orders, size: int) -> None:
        self.cluster, self.work, self.orders, self.size = cluster, work, orders, size
        self.calls: dict[Any, Hand] = {}
        self.idle: list[Hand] = []
        self.placed_at = time.monotonic()

    def run(self) -> Iterator[Step]:
        """A step per trial and batch, as they come in.

        Raises:
            ValueError: a node has other code, another model or benchmark, or not got them.
            TrialsFailedError: no worker is left or has found room; or some batches were given up,
                and all others are answered.
        """
        for _ in range(self.size):
            self._hire(0)
        why = ""
        while not self.work.done:
            if not self.calls and not self.idle:
                raise TrialsFailedError(
                    f"no worker is left on Ray, {MOST_LOST} were lost in a row in every place "
                    f"({why}); what was answered is kept, and the same command goes on"
                )
            self._check_room()
            for call in self.cluster.wait(list(self.calls), _LOOK):
                hand = self.calls.pop(call)
                try:
                    result = self.cluster.result(call)
                except LostError as error:
                    why = f"the last on {hand.address}: {error}"
                    yield self._lost(hand, error)
                except (ValueError, OSError, ImportError) as error:
                    raise ValueError(f"the worker on {hand.address}: {error}") from error
                else:
                    yield from hand.then(hand, result)
            while self.idle and (shard := self.work.take()) is not None:
                self._give(self.idle.pop(), shard)
        if self.work.given_up:
            raise TrialsFailedError(_given_up(self.work))

    # ------------------------------------------------------------------ a worker's way

    def _hire(self, lost: int) -> None:
        actor = self.cluster.start(self.orders.device, self.orders.threads)
        self.calls[actor.who.remote()] = Hand(actor, lost, self._met)

    def _met(self, hand: Hand, who: dict[str, str]) -> Sequence[Step]:
        hand.address, hand.placed = who["address"], True
        self._compare(hand, who)
        hand.then = self._loaded
        self.calls[hand.actor.load.remote(self.orders.settings, self.orders.gallery)] = hand
        return ()

    def _loaded(self, hand: Hand, told: dict[str, str]) -> Sequence[Step]:
        self._compare(hand, told)
        hand.then = self._answered
        self.idle.append(hand)
        return ()

    def _answered(self, hand: Hand, step: Step | NoRoomError) -> Sequence[Step]:
        assert hand.shard is not None
        assert hand.task is not None
        hand.lost, trial = 0, hand.task.trial
        if isinstance(step, NoRoomError):
            step = unreachable(trial, step) if trial.runs else Step()  # another said so before
            self.work.drop(trial.id)
        if hand.shard.open:
            self._ask(hand, hand.shard)  # before the rows are written, which takes its time
        else:
            self.work.finish(hand.shard)
            hand.shard = None
            self.idle.append(hand)
        return (step,)

    def _give(self, hand: Hand, shard: Shard) -> None:
        hand.shard = shard
        self._ask(hand, shard)

    def _ask(self, hand: Hand, shard: Shard) -> None:
        hand.task = shard.open.popleft()
        self.calls[hand.actor.answer.remote(hand.task, shard.start, shard.stop)] = hand

    def _compare(self, hand: Hand, told: Mapping[str, str]) -> None:
        for name, value in self.orders.wanted.items():
            if told.get(name, value) != value:
                raise ValueError(
                    f"the worker on {hand.address} has another {name} ({told[name][:16]}) than "
                    f"this process ({value[:16]}); all nodes should have the same"
                )

    # ------------------------------------------------------------------ losses

    def _lost(self, hand: Hand, error: LostError) -> Step:
        """Its batch goes to whoever is free; its place is filled again."""
        self.cluster.end(hand.actor)
        note = f"a worker on {hand.address} was lost ({error})"
        if hand.shard is not None and hand.task is not None:
            where = f"on {hand.address}: {error}"
            again = self.work.put_back(hand.shard, hand.task, where)
            note += f"; {hand.task.trial.id} on its batch is " + (
                "answered again" if again else "given up"
            )
        if hand.lost + 1 < MOST_LOST:
            self._hire(hand.lost + 1)
        return Step(note=note)

    def _check_room(self) -> None:
        now = time.monotonic()
        if self.idle or any(hand.placed for hand in self.calls.values()):
            self.placed_at = now
        elif now - self.placed_at > PATIENCE:
            raise TrialsFailedError(
                f"Ray has found no room for a worker for {PATIENCE / 60:.0f} minutes; what was "
                "answered is kept, and the same command goes on"
            )


def _given_up(work: Work) -> str:
    shard, last = work.given_up[0]
    more = len(work.given_up) - 1
    those = f"these and {more} more batches are" if more else "this batch is"
    return (
        f"{shard.losses} workers were lost while they answered questions {shard.questions} (last "
        f"{last}); {those} left out, all others are answered. Run the same command again to try "
        "again"
    )
