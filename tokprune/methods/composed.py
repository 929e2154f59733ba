"""Several methods at work together, each at its own stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tokprune.engine.check import check_plan
from tokprune.engine.contracts import ModelFacts, Plan
from tokprune.errors import CompositionError
from tokprune.methods.base import Method


@dataclass(frozen=True)
class Composed(Method):
    """Several methods at work together, each at its own stage; made by :func:`compose`."""

    name: ClassVar[str] = "compose"
    methods: tuple[Method, ...] = ()

    def on(self, facts: ModelFacts) -> Composed:
        return replace(self, methods=tuple(method.on(facts) for method in self.methods))

    def plan(self, facts: ModelFacts) -> Plan:
        methods = [method.on(facts) for method in self.methods]
        plans = [(type(m).__name__, check_plan(m, m.plan(facts), facts)) for m in methods]
        reducing = [n for n, p in plans if any(s.reduces for s in p.encoder)]
        if len(reducing) > 1:
            raise CompositionError(
                f"{' and '.join(reducing)} both drop or merge tokens inside the vision encoder; "
                "the second would score tokens that the first has already replaced. Keep one"
            )
        inside = [n for n, p in plans if p.encoder]
        adding = [n for n, p in plans if any(s.alters for s in p.encoder)]
        if adding and len(inside) > 1:
            raise CompositionError(
                f"{adding[0]} changes what the vision encoder computes, and "
                f"{' and '.join(n for n in inside if n != adding[0])} would read that in place of "
                "the model's own; combine it with methods that work behind the encoder"
            )
        prompt = [n for n, p in plans if p.prompt]
        if len(prompt) > 1:
            raise CompositionError(
                f"{' and '.join(prompt)} both select after the projector, each to its own budget; "
                "only the smaller would count. Keep one"
            )
        decoder = [n for n, p in plans if p.decoder]
        if len(decoder) > 1:
            raise CompositionError(
                f"{' and '.join(decoder)} both prune inside the decoder; their layer schedules "
                "and scores assume the full sequence of the other. Keep one (or switch the "
                "decoder stage of one off)"
            )
        return Plan(
            encoder=tuple(s for _, p in plans for s in p.encoder),
            prompt=tuple(s for _, p in plans for s in p.prompt),
            decoder=tuple(s for _, p in plans for s in p.decoder),
        )


def composed(methods: Sequence[Method]) -> Composed:
    """Methods put together; compositions among them are taken apart first.

    Raises:
        CompositionError: fewer than two, or different ``video_unit`` or ``rectify``.
    """
    parts: list[Method] = []
    for method in methods:
        parts += method.methods if isinstance(method, Composed) else [method]
    if len(parts) < 2:
        raise CompositionError(f"compose needs at least two methods, got {len(parts)}")
    units = list(dict.fromkeys(part.video_unit for part in parts))
    if len(units) > 1:
        raise CompositionError(
            f"methods with different video_unit ({', '.join(map(repr, units))}) see a video in "
            "different parts; give all of them the same"
        )
    lifts = list(dict.fromkeys(part.rectify for part in parts if part.rectify is not None))
    if len(lifts) > 1:
        raise CompositionError(
            f"methods with different rectify ({', '.join(map(repr, lifts))}) share one decoder; "
            "give one of them, or all the same"
        )
    rectify = lifts[0] if lifts else None
    return Composed(methods=tuple(parts), video_unit=units[0], rectify=rectify)
