"""What a search tries: one method, or several at their own stages, but for the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tokprune.eval.sweep.budgets import Budget
from tokprune.methods import Method, make_method
from tokprune.methods.composed import Composed, composed


@dataclass(frozen=True)
class Part:
    """A method and options. ``times``: budgets among them, as multiples of the tokens sought."""

    method: str
    options: Mapping[str, Any]
    times: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """Something to try. The last part meets the budget by its ``keep``; those before it leave
    multiples of it. See :class:`tokprune.eval.sweep.variants.Turnable` for the rest."""

    parts: tuple[Part, ...]
    rectify: str | None
    #: options of methods on this decoder that are not their defaults
    usual: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: what is sought, and the visual tokens of an unpruned image
    budget: Budget | None = None
    visual_tokens: float = 0.0

    @property
    def control(self) -> bool:
        return False

    @property
    def unpatched(self) -> str:
        return ""

    @property
    def turn(self) -> str | None:
        """The knob is always ``keep``."""
        return None

    def seeking(self, budget: Budget, visual_tokens: float) -> Candidate:
        """The same for a budget."""
        return replace(self, budget=budget, visual_tokens=visual_tokens)

    @property
    def method(self) -> str:
        return self.parts[0].method if len(self.parts) == 1 else Composed.name

    @property
    def name(self) -> str:
        """Its methods, in the order in which tokens meet them."""
        return "+".join(part.method for part in self.parts)

    @property
    def options(self) -> Mapping[str, Any]:
        """As far as they are known without a budget."""
        if len(self.parts) == 1:
            return self.parts[0].options
        return {"methods": [{"method": p.method, "options": p.options} for p in self.parts]}

    def to_turn(self, decoder_layers: int, seed: int = 0) -> Method:
        return self.at(1, decoder_layers, seed)

    def at(self, keep: int | float, decoder_layers: int, seed: int = 0) -> Method:
        """The method object that keeps so much at last.

        Raises:
            ValueError: options or budgets do not fit, or the parts each other.
        """
        made = []
        for number, part in enumerate(self.parts):
            budgets = {option: self._amount(times) for option, times in part.times.items()}
            if number + 1 == len(self.parts):
                budgets["keep"] = keep
            options = {**self.usual.get(part.method, {}), **part.options, **budgets}
            if self.rectify is not None:
                options["rectify"] = self.rectify
            try:
                made.append(make_method(part.method, **options))
            except TypeError as error:
                raise ValueError(str(error)) from None
        return made[0] if len(made) == 1 else composed(made)

    def _amount(self, times: float) -> int | float:
        """A multiple of the budget, of the kind that the budget is."""
        assert self.budget is not None
        if self.budget.share is not None:
            return min(1.0, times * self.budget.share)
        tokens = times * self.budget.tokens(self.visual_tokens)
        return max(1, min(round(tokens), int(self.visual_tokens)))
