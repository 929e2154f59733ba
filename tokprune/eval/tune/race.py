"""Races: all answer a few questions, the better ones more, the best all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tokprune.eval.benchmarks.base import Item

Scores = Mapping[str, float]

#: how many times as many questions a stage has as the one before, and one in how many goes on
ETA = 3
#: stages, the last one with all questions
STAGES = 3
#: of the normal distribution: what lies 5 % above
_Z = 1.645


def stages(items: Sequence[Item], tasks: int) -> list[Sequence[Item]]:
    """The questions of each stage, those of the stages before among them.

    Args:
        items: in an order in which the tasks take turns.
        tasks: their number; the first stage has at least two questions of each.
    """
    sizes = {
        min(len(items), max(2 * tasks, math.ceil(len(items) / ETA ** (STAGES - 1 - stage))))
        for stage in range(STAGES)
    }
    return [items[:size] for size in sorted(sizes)]


def accuracy(scores: Scores, items: Sequence[Item]) -> float:
    """Macro average over the tasks of the questions; one without a score counts as incorrect."""
    by_task: dict[str, list[float]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(scores.get(item.id, 0.0))
    return sum(sum(own) / len(own) for own in by_task.values()) / len(by_task)


def hopeless(scores: Scores, best: Scores, items: Sequence[Item]) -> bool:
    """Whether even the upper end of what it may gain on ``best`` (one-sided 95 %, paired by
    question) is a loss."""
    by_task: dict[str, list[float]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(scores.get(item.id, 0.0) - best[item.id])
    gap = variance = 0.0
    for own in by_task.values():
        mean = sum(own) / len(own)
        gap += mean / len(by_task)
        spread = sum((value - mean) ** 2 for value in own) / max(1, len(own) - 1)
        variance += spread / len(own) / len(by_task) ** 2
    return gap + _Z * math.sqrt(variance) < 0


@dataclass
class Runner:
    """Something in a race. ``steps``: its accuracy after each stage that it ran; ``out``: why it
    ended before the last, None: it did not; ``fault``: why it is no result, None: it is one."""

    id: str
    #: of the budget that it competes at
    group: str
    steps: list[float] = field(default_factory=list)
    out: str | None = None
    fault: str | None = None


def race(
    runners: Sequence[Runner],
    courses: Sequence[Sequence[Item]],
    ask: Callable[[Sequence[str], Sequence[Item]], None],
    scores: Callable[[str], Scores],
    fault: Callable[[str], str | None],
    best: Mapping[str, Scores],
    through: int,
) -> None:
    """Run a race: after each stage one in :data:`ETA` of each group goes on, and none that is
    hopeless.

    Args:
        runners: who runs; what becomes of them is written into them.
        courses: questions of each stage.
        ask: has runners (by id) answer questions.
        scores: what a runner has scored so far, by question.
        fault: why what a runner answers is no result, None where it is one.
        best: scores of the best so far on all questions, by group; may lack groups.
        through: as many of each group go on at the least, where as many are no hopeless ones.
    """
    done: Sequence[Item] = ()
    for number, items in enumerate(courses):
        alive = [runner for runner in runners if runner.out is None]
        if not alive:
            return
        ask([runner.id for runner in alive], items[len(done) :])
        done = items
        for runner in alive:
            runner.steps.append(accuracy(scores(runner.id), items))
            runner.out = runner.fault = fault(runner.id)
        if number + 1 < len(courses):
            for group in dict.fromkeys(runner.group for runner in alive):
                own = [r for r in alive if r.group == group and r.out is None]
                _cut(own, items, scores, best.get(group), through)


def _cut(
    own: Sequence[Runner],
    items: Sequence[Item],
    scores: Callable[[str], Scores],
    best: Scores | None,
    through: int,
) -> None:
    ranked = sorted(own, key=lambda runner: -runner.steps[-1])
    places = max(through, math.ceil(len(own) / ETA))
    for place, runner in enumerate(ranked):
        if place >= places:
            runner.out = f"place {place + 1} of {len(own)} after {len(items)} questions"
        elif best is not None and hopeless(scores(runner.id), best, items):
            runner.out = f"worse than the best so far after {len(items)} questions"
