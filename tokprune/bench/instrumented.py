"""A method with someone looking over its shoulder: every call of its stages goes through a watcher.

The watcher sees where a call happens and may time it or write its answer down; the method, the
engine and the order of events stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    CachePolicy,
    DecoderRun,
    DecoderStage,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    KeepDecision,
    ModelFacts,
    Plan,
    PromptStage,
    Reduction,
    ScoringLayer,
    Selection,
    SequenceView,
    TowerInput,
    TowerTokens,
)
from tokprune.methods.base import Method


@dataclass(frozen=True)
class Place:
    """Where a stage is called: its part of the model, its number in the plan, the call's name
    (as in :mod:`tokprune.engine.contracts`) and the layer, where it has one."""

    part: Literal["encoder", "prompt", "decoder"]
    stage: int
    call: str
    layer: int | None = None


#: gets the place, the function and its arguments; returns what the function returned
Watcher = Callable[..., Any]


@dataclass(frozen=True)
class Watched(Method):
    """``inner``, with each call of its stages handed to ``watcher(place, function, *arguments)``,
    which must call the function once and return its answer."""

    name: ClassVar[str] = "watched"
    inner: Method
    watcher: Watcher

    def __post_init__(self) -> None:
        object.__setattr__(self, "video_unit", self.inner.video_unit)

    def plan(self, facts: ModelFacts) -> Plan:
        plan, watcher = self.inner.plan(facts), self.watcher
        return Plan(
            encoder=tuple(_EncoderStage(i, s, watcher) for i, s in enumerate(plan.encoder)),
            prompt=tuple(_PromptStage(i, s, watcher) for i, s in enumerate(plan.prompt)),
            decoder=tuple(_DecoderStage(i, s, watcher) for i, s in enumerate(plan.decoder)),
        )


class _EncoderStage(EncoderStage):
    def __init__(self, number: int, inner: EncoderStage, watcher: Watcher) -> None:
        self.number, self.inner, self.watcher = number, inner, watcher
        self.taps, self.bias_layers = inner.taps, inner.bias_layers
        self.between_layers, self.after_layers = inner.between_layers, inner.after_layers
        self.order, self.positions = inner.order, inner.positions

    @property
    def reduces(self) -> bool:
        return self.inner.reduces

    @property
    def reduces_videos(self) -> bool:
        return self.inner.reduces_videos

    def start(self, tower: TowerInput) -> EncoderRun:
        place = Place("encoder", self.number, "start")
        return _EncoderRun(self.number, self.watcher(place, self.inner.start, tower), self.watcher)


class _EncoderRun(EncoderRun):
    def __init__(self, number: int, inner: EncoderRun, watcher: Watcher) -> None:
        self.number, self.inner, self.watcher = number, inner, watcher

    def _call(self, name: str, layer: int | None, *arguments: Any) -> Any:
        place = Place("encoder", self.number, name, layer)
        return self.watcher(place, getattr(self.inner, name), *arguments)

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        self._call("attention", layer, layer, attention, tokens)

    def bias(self, layer: int, tokens: TowerTokens) -> Tensor | None:
        answer: Tensor | None = self._call("bias", layer, layer, tokens)
        return answer

    def between(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        answer: Reduction | None = self._call("between", layer, layer, hidden, tokens)
        return answer

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        answer: Reduction | None = self._call("after", layer, layer, hidden, tokens)
        return answer

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        answer: EncoderOutcome = self._call("finish", None, tokens)
        return answer


class _PromptStage(PromptStage):
    def __init__(self, number: int, inner: PromptStage, watcher: Watcher) -> None:
        self.number, self.inner, self.watcher = number, inner, watcher
        self.positions = inner.positions
        self.wants_raw, self.wants_text = inner.wants_raw, inner.wants_text

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        place = Place("prompt", self.number, "select")
        answers: list[Selection | None] = self.watcher(place, self.inner.select, images)
        return answers


class _DecoderStage(DecoderStage):
    def __init__(self, number: int, inner: DecoderStage, watcher: Watcher) -> None:
        self.number, self.inner, self.watcher = number, inner, watcher
        self.taps, self.transition_layers = inner.taps, inner.transition_layers
        self.prune_layers, self.has_cache_policy = inner.prune_layers, inner.has_cache_policy

    def start(self) -> DecoderRun:
        place = Place("decoder", self.number, "start")
        return _DecoderRun(self.number, self.watcher(place, self.inner.start), self.watcher)


class _DecoderRun(DecoderRun):
    def __init__(self, number: int, inner: DecoderRun, watcher: Watcher) -> None:
        self.number, self.inner, self.watcher = number, inner, watcher

    def _call(self, name: str, layer: int | None, *arguments: Any) -> Any:
        place = Place("decoder", self.number, name, layer)
        return self.watcher(place, getattr(self.inner, name), *arguments)

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        self._call("attention", layer, layer, attention, sequence)

    def transition(
        self, layer: int, module: Literal["attention", "mlp"], before: Tensor, after: Tensor,
        sequence: SequenceView,
    ) -> None:  # fmt: skip
        self._call("transition", layer, layer, module, before, after, sequence)

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        answer: KeepDecision | None = self._call(
            "before_layer", layer, layer, hidden, sequence, scoring
        )
        return answer

    def dropped(self, layer: int, index: Tensor) -> None:
        self._call("dropped", layer, layer, index)

    def after_prefill(self, sequences: Sequence[SequenceView]) -> CachePolicy | None:
        answer: CachePolicy | None = self._call("after_prefill", None, sequences)
        return answer


class Stopwatch:
    """Sums the seconds spent inside a method's own code; synchronises around every call, so use
    it in a pass of its own."""

    def __init__(self, device: Any, clock: str = "wall") -> None:
        self.device, self.clock, self.seconds = device, clock, 0.0

    def __call__(self, place: Place, function: Callable[..., Any], *arguments: Any) -> Any:
        from tokprune.bench.clock import CLOCKS, synchronise

        now = CLOCKS[self.clock]
        synchronise(self.device)
        start = now()
        answer = function(*arguments)
        synchronise(self.device)
        self.seconds += now() - start
        return answer
