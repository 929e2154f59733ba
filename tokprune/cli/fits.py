"""Which method works on a model, found by planning each of them on the model's facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tokprune.engine.check import check_plan
from tokprune.engine.model import ModelFacts
from tokprune.methods import Method, available_methods

Status = Literal["works", "substitute", "refused"]

#: budgets to plan with: not every grid, and not every tower, can be cut to every share
_BUDGETS = (0.25, 0.5, 0.75, 1 / 9)


@dataclass(frozen=True)
class Fit:
    """How a method does on a model.

    Args:
        method: its name.
        status: it works as it is; with other options, or something else in place of what it reads;
            or not at all.
        why: what is different, or why not; "" where it works.
        options: options that it was planned with, beside the budget, where the defaults do not fit.
    """

    method: str
    status: Status
    why: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def fits(facts: ModelFacts) -> list[Fit]:
    """All methods on a model."""
    return [fit(cls, facts) for cls in available_methods().values()]


def fit(cls: type[Method], facts: ModelFacts) -> Fit:
    """One method on a model."""
    problem: Exception | None = None
    for number, options in enumerate(_tries(cls, facts)):
        error = _problem(cls, facts, options)
        if error is None:
            other = _difference(cls, facts, options)
            if number:
                given = ", ".join(f"{name}={value!r}" for name, value in options.items())
                other = f"with {given}" + (f"; {other}" if other else "")
            return Fit(cls.name, "substitute" if other else "works", other, options)
        problem = problem or error
    return Fit(cls.name, "refused", _sentence(problem, cls.name, facts.family))


def _tries(cls: type[Method], facts: ModelFacts) -> Iterator[dict[str, Any]]:
    """Options to plan with, the usual ones first."""
    try:
        usual = cls.options_for_depth(facts.decoder_layers)
    except ValueError:  # a decoder too short for its schedule: planning says so
        usual = {}
    yield usual
    others: dict[str, Any] = {}
    for setting in cls.without_tower if facts.tower is None else ():
        others = dict(setting)
        yield {**usual, **others}
    known = {field.name for field in dataclasses.fields(cls)}
    if facts.attention_layers is not None and "prune_before" in known:
        # ranked by the attention of the layer before, or of the layer itself
        for shift in (1, 0):
            layers = (n + shift for n in sorted(facts.attention_layers))
            some = tuple(n for n in layers if 0 < n < facts.decoder_layers)
            for layer in (some, *some):
                yield {**usual, "prune_before": layer}
                yield {**usual, **others, "prune_before": layer}


def _problem(cls: type[Method], facts: ModelFacts, options: dict[str, Any]) -> Exception | None:
    """Why a method cannot be planned with these options, whatever the budget; None: it can."""
    named = {field.name: field for field in dataclasses.fields(cls)}
    budgets: list[dict[str, Any]] = []
    if "keep" in named:
        budgets = [{"keep": budget} for budget in _BUDGETS]
        if named["keep"].default is not None and named["keep"].default is not dataclasses.MISSING:
            budgets.insert(0, {})  # it has a schedule of its own
    first: Exception | None = None
    for budget in budgets or [{}]:
        try:
            made = cls(**options, **budget).on(facts)
            check_plan(made, made.plan(facts), facts)
        except (ValueError, TypeError) as error:
            first = first or error
        else:
            return None
    return first


def _difference(cls: type[Method], facts: ModelFacts, options: dict[str, Any]) -> str:
    """What a method does otherwise on a model than where it was published; "" if nothing."""
    looked_at = facts.tower or getattr(facts, "observed", None)
    found = []
    if any(setting.items() <= options.items() for setting in cls.without_tower):
        return ""  # nothing is read there
    if cls.without_class_token and not (looked_at and looked_at.has_cls):
        found.append(cls.without_class_token)
    if cls.without_tower_rows and facts.tower is None:
        found.append(cls.without_tower_rows)
    return "; ".join(found)


def _sentence(error: Exception | None, method: str, family: str) -> str:
    """An error without names and advice that the table gives, so that methods can share it."""
    text = str(error).split(". Methods that")[0].split("; use a method")[0].replace("\n", " ")
    for within in (f", which {family} does not allow: ", f", and {family} "):
        text = text.replace(within, ", and here " if within.endswith(": ") else ", and this model ")
    return text.removeprefix(f"{method} ")
