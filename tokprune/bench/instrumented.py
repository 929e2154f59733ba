"""An instrumented method: every call of its stages goes through an observer.

The observer sees where a call happens and may time it or write its answer down; the method, the
engine and the order of events stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar

from tokprune.engine.contracts import ModelFacts, Plan
from tokprune.methods.base import Method

T = TypeVar("T")
Part: TypeAlias = Literal["encoder", "prompt", "decoder"]

#: what the engine calls of the runs that a stage starts, and of a prompt stage itself
_CALLS: dict[Part, tuple[str, ...]] = {
    "encoder": ("attention", "bias", "between", "after", "finish"),
    "prompt": ("select",),
    "decoder": ("attention", "transition", "before_layer", "dropped", "after_prefill"),
}


@dataclass(frozen=True)
class Place:
    """Where a stage is called."""

    part: Part
    #: its number in the plan
    stage: int
    #: name of the call, as in :mod:`tokprune.engine.contracts`
    call: str
    #: the layer, where it has one
    layer: int | None = None


#: gets the place, the function and its arguments; returns what the function returned
Observer = Callable[..., Any]


@dataclass(frozen=True)
class Instrumented(Method):
    """``inner``, with each call of its stages handed to ``observer(place, function, *arguments)``,
    which must call the function once and return its answer."""

    name = "instrumented"
    inner: Method
    observer: Observer

    def __post_init__(self) -> None:
        for name in ("video_unit", "rectify"):
            object.__setattr__(self, name, getattr(self.inner, name))

    def on(self, facts: ModelFacts) -> Instrumented:
        return replace(self, inner=self.inner.on(facts))

    def plan(self, facts: ModelFacts) -> Plan:
        plan = self.inner.plan(facts)
        for number, stage in enumerate(plan.prompt):
            self._observe("prompt", number, stage, _CALLS["prompt"])
        for number, encoder in enumerate(plan.encoder):
            self._observe_runs("encoder", number, encoder)
        for number, decoder in enumerate(plan.decoder):
            self._observe_runs("decoder", number, decoder)
        return plan

    def _observe_runs(self, part: Part, number: int, stage: Any) -> None:
        """The start of every run, and all that is called of it."""
        self._observe(part, number, stage, ("start",))
        start = stage.start

        def observed(*arguments: Any) -> Any:
            return self._observe(part, number, start(*arguments), _CALLS[part])

        stage.start = observed

    def _observe(self, part: Part, number: int, target: T, names: Iterable[str]) -> T:
        """``target``, whose calls of these names go through the observer."""
        for name in names:
            setattr(target, name, self._through(part, number, name, getattr(target, name)))
        return target

    def _through(
        self, part: Part, number: int, name: str, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            layer = arguments[0] if arguments and isinstance(arguments[0], int) else None
            return self.observer(Place(part, number, name, layer), function, *arguments)

        return call


class Stopwatch:
    """Sums the seconds spent inside a method's own code, and says how many of them in which part;
    synchronises around every call, so use it in a pass of its own."""

    def __init__(self, device: Any, clock: str = "wall") -> None:
        self.device, self.clock = device, clock
        self.by_part: dict[Part, float] = {}

    @property
    def seconds(self) -> float:
        return sum(self.by_part.values())

    def __call__(self, place: Place, function: Callable[..., Any], *arguments: Any) -> Any:
        from tokprune.bench.clock import CLOCKS, synchronise

        now = CLOCKS[self.clock]
        synchronise(self.device)
        start = now()
        answer = function(*arguments)
        synchronise(self.device)
        self.by_part[place.part] = self.by_part.get(place.part, 0.0) + now() - start
        return answer
