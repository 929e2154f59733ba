"""What a search may set: derived from what methods say of their own options.

An option's annotation (:mod:`tokprune.methods.options`) says what it can be, and its default where
to look: a ``Literal`` or ``bool`` its choices, a range of numbers the part around the default, a
further budget multiples of the one that is sought, ``prune_before`` the decoder's layers. Options
that decide nothing of this kind (seeds, what may be None and is no choice) stay as they are; a
method says more in :attr:`~tokprune.methods.base.Method.searched`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from tokprune.engine.contracts import Plan
from tokprune.engine.contracts.rectify import WORDS
from tokprune.engine.model import ModelFacts
from tokprune.errors import UnsupportedModelError
from tokprune.eval.tune.candidate import Candidate, Part
from tokprune.methods import Method, available_methods, make_method
from tokprune.methods.options import (
    AtLeast,
    LayerNumbers,
    Range,
    check_keep,
    check_seed,
    hints_of,
    is_whole,
)

#: numbers are sought between the default divided by this and multiplied by it
_AROUND = 4.0
#: the largest upper end that a range can have and still be searched as a whole
_WIDE = 2.0
#: pruning steps of a schedule, at most
_STEPS = 3
#: further budgets, and those of earlier stages, as multiples of the tokens sought
_TIMES = (1.1, 6.0)
#: words of options that look at all images of a call together
_OVER_THE_BATCH = ("call", "batch")
#: decided beside the options of the methods; published settings tell nothing of these
STRUCTURE = frozenset({"with_prompt", "prompt", "with_decoder", "decoder", "rectify"})


@dataclass(frozen=True)
class Choice:
    """One of these values: None, bool, int, float or str."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Number:
    """A number from ``low`` to ``high``; ``log``: sought by its order of magnitude."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Layers:
    """One decoder layer from ``first`` on, or up to :data:`_STEPS` of them; ``optional``: or what
    the method makes of None."""

    first: int
    several: bool
    optional: bool


@dataclass(frozen=True)
class Budgets:
    """A multiple of the tokens sought; ``optional``: or None."""

    optional: bool


Dimension = Choice | Number | Layers | Budgets


class Chooser(Protocol):
    """Who decides: a sampler, or the options of a published setting."""

    def __call__(self, name: str, dimension: Choice | Number, usual: Any) -> Any:
        """A value of the dimension; ``usual``: the published one."""


def dimensions(cls: type[Method]) -> dict[str, Dimension]:
    """What can be sought of a method, by option."""
    found: dict[str, Dimension] = {}
    for option in dataclasses.fields(cls):
        if not option.init or option.name in cls.budget_options or option.name == "rectify":
            continue
        if option.name in cls.searched:
            values = tuple(cls.searched[option.name])
            own: Dimension | None = Choice(values) if len(values) > 1 else None
        else:
            own = _dimension(option.name, hints_of(cls)[option.name], option.default)
        if own is not None:
            found[option.name] = own
    return found


def _dimension(name: str, hint: Any, default: Any) -> Dimension | None:
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        others = [part for part in parts if part is not type(None)]
        words = [part for part in others if typing.get_origin(part) is Literal]
        if words and len(others) > 1:  # words, or something that is made for a purpose
            parts = (*typing.get_args(words[0]), *([None] if len(others) < len(parts) else []))
            return _choice(parts)
        if len(others) != 1 or len(parts) != 2:
            return None
        own = _dimension(name, others[0], default)
        if isinstance(own, Choice):
            return Choice((*own.values, None))
        if isinstance(own, Budgets | Layers):
            return dataclasses.replace(own, optional=True)
        return None  # what None comes to, the method knows
    if typing.get_origin(hint) is Literal:
        return _choice(parts)
    if hint is bool:
        return Choice((False, True))
    if typing.get_origin(hint) is not Annotated:
        return None
    kind, checks = parts[0], parts[1:]
    if check_seed in checks:
        return None
    if check_keep in checks:
        return Budgets(optional=False)
    for check in checks:
        if isinstance(check, LayerNumbers):
            return Layers(check.first, kind is not int, optional=False)
        if isinstance(check, AtLeast) and name == "prune_before":
            return Layers(check.least, several=False, optional=False)
        if isinstance(check, AtLeast) and is_whole(default):
            low = max(check.least, int(default / _AROUND))
            return Number(low, max(int(default * _AROUND), low + 1), log=low > 0, whole=True)
        if isinstance(check, Range) and isinstance(default, int | float):
            return _range(check, float(default))
    return None


def _choice(values: Sequence[Any]) -> Choice | None:
    """Words that say "over the batch" are left out: answers must not depend on what else is asked
    at the same time."""
    alone = tuple(value for value in values if value not in _OVER_THE_BATCH)
    return Choice(alone) if len(alone) > 1 else None


def _range(check: Range, default: float) -> Number:
    if check.high - check.low <= _WIDE:
        return Number(check.low + (1e-3 if check.low_open else 0), check.high)
    if default > 0:
        return Number(max(check.low, default / _AROUND), min(check.high, default * _AROUND), True)
    return Number(max(check.low, default - 1), default + 1)


@dataclass(frozen=True)
class Space:
    """Everything that is tried on a model.

    ``alone``: methods that may come first, or be the only one; ``prompt``, ``decoder``: those that
    work behind the projector, or inside the decoder, and nowhere else: a later stage of a
    composition.
    """

    facts: ModelFacts
    alone: tuple[str, ...]
    prompt: tuple[str, ...]
    decoder: tuple[str, ...]
    #: options of the methods on this decoder that are not their defaults
    usual: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: ModelFacts, names: Sequence[str]) -> Space:
        """The space of some methods; those that do not run on the model are left out.

        Raises:
            ValueError: none of them runs.
        """
        usual: dict[str, Mapping[str, Any]] = {}
        plans: dict[str, Plan | None] = {}
        for name in names:
            try:
                usual[name] = available_methods()[name].options_for_depth(facts.decoder_layers)
                plans[name] = plan_of(name, usual[name], facts)
            except (UnsupportedModelError, ValueError):
                continue
        if not plans:
            raise ValueError(f"methods={', '.join(names)}: none of them runs on this model")
        known = {name: plan for name, plan in plans.items() if plan is not None}
        return cls(
            facts,
            tuple(plans),
            tuple(n for n, p in known.items() if p.prompt and not p.decoder and not _reduces(p)),
            tuple(n for n, p in known.items() if p.decoder and not p.prompt and not _reduces(p)),
            usual,
        )

    def walk(self, choose: Chooser, published: Candidate | None = None) -> Candidate:
        """One thing to try, decided step by step; ``published``: what the usual value of every step
        is taken from."""
        first = published.parts[0] if published is not None else None
        name = choose("method", Choice(self.alone), None if first is None else first.method)
        parts = [self._part(name, choose, first)]
        plan = plan_of(name, {**self.usual[name], **parts[0].options}, self.facts)
        if plan is not None:
            after = []
            if _reduces(plan) and not plan.prompt:
                after.append(("prompt", self.prompt))
            if not plan.decoder:
                after.append(("decoder", self.decoder))
            for stage, names in after:
                if not names or not choose(f"with_{stage}", Choice((False, True)), False):
                    continue
                then = choose(stage, Choice(names), names[0])
                if then == name:
                    continue
                times = choose(f"{stage}.times", Number(*_TIMES, log=True), 2.0)
                before = dataclasses.replace(
                    parts[-1], times={**parts[-1].times, "keep": _short(times)}
                )
                parts = [*parts[:-1], before, self._part(then, choose, None)]
        rectify = choose("rectify", Choice((None, *WORDS)), None)
        return Candidate(tuple(parts), rectify, self.usual)

    def earliest(self, name: str) -> Candidate | None:
        """A method with the earliest schedule that it may have, None where it has none."""
        for option, own in dimensions(available_methods()[name]).items():
            if isinstance(own, Layers):
                return Candidate((Part(name, {option: own.first}),), None, self.usual)
        return None

    def _part(self, name: str, choose: Chooser, published: Part | None) -> Part:
        options: dict[str, Any] = {} if published is None else dict(published.options)
        times: dict[str, float] = {}
        cls = available_methods()[name]
        defaults = {f.name: f.default for f in dataclasses.fields(cls)} | dict(self.usual[name])
        for option, dimension in dimensions(cls).items():
            label, usual = f"{name}.{option}", options.get(option, defaults[option])
            if isinstance(dimension, Budgets):
                how = ("own", "multiple")
                if choose(f"{label}.is", Choice(how), "own") == "multiple":
                    times[option] = _short(choose(label, Number(0.5, _TIMES[1], log=True), 1.0))
            elif isinstance(dimension, Layers):
                layers = self._layers(label, dimension, choose, usual)
                if layers is not None:
                    options[option] = layers
            else:
                value = choose(label, dimension, usual)
                value = _short(value) if isinstance(value, float) else value
                if value != usual or option in options:
                    options[option] = value
        return Part(name, options, times)

    def _layers(self, label: str, own: Layers, choose: Chooser, usual: Any) -> Any:
        last = self.facts.decoder_layers - 1
        if last < own.first:
            return None
        listed = list(usual) if isinstance(usual, Sequence) else [] if usual is None else [usual]
        fewest = 0 if own.optional else 1
        most = min(_STEPS, last - own.first + 1) if own.several else 1
        steps = len(listed)
        if fewest < most:
            steps = choose(f"{label}.steps", Choice(tuple(range(fewest, most + 1))), steps)
        chosen = {
            choose(
                f"{label}.{number}",
                Number(own.first, last, whole=True),
                listed[number] if number < len(listed) else None,
            )
            for number in range(steps)
        } - {None}  # fmt: skip
        if not chosen or sorted(chosen) == listed:
            return None
        layers = tuple(sorted(chosen))
        return layers if len(layers) > 1 else layers[0]


def plan_of(name: str, options: Mapping[str, Any], facts: ModelFacts) -> Plan | None:
    """The stages of a method on a model, at some budget that it takes; None where none of a few
    does.

    Raises:
        UnsupportedModelError: it does not run on the model at all.
    """
    for part in (2, 4, 9, 16, 1):
        try:
            keep = max(1, math.ceil(facts.max_visual_tokens / part))
            method = make_method(name, **{**options, "keep": keep}).on(facts)
            return method.plan(facts)
        except UnsupportedModelError:
            raise
        except (ValueError, TypeError):
            continue
    return None


def _reduces(plan: Plan) -> bool:
    return any(stage.reduces for stage in plan.encoder)


def _short(value: float) -> float:
    """Three digits: more would only look exact."""
    return float(f"{value:.3g}")
