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
#: options by which a method does without the vision encoder
_WITHOUT_TOWER: dict[str, dict[str, Any]] = {
    "centerclip": {"place": "projector"},
    "mustdrop": {"spatial": False, "key_rate": 0},
}
#: what stands in for the attention of a class token, where there is none to look at
_WITHOUT_CLASS_TOKEN = {
    "todre": "the pivot is the token farthest from the mean, not the one the class token names",
    "flowcut": "the mean query stands in for the class token's",
    "mustdrop": "the mean attention that a token receives stands in for the class token's",
    "visionzip": "the mean attention that a token receives stands in for the class token's",
}
#: what is done elsewhere where no stage may change rows of the vision encoder
_WITHOUT_ITS_PLACE = {
    "centerclip": "clusters after the projector, not at the layer that the features are read from",
    "flowcut": "tokens are made of patches that need not be neighbours, and take the first places",
    "mustdrop": "merges at the language-model input, not inside the vision encoder",
    "visionzip": "keeps and merges at the language-model input, not at the feature layer",
    "pool": "windows of each image's own grid; those at its edges may be smaller",
    "m3": "windows of each image's own grid; those at its edges may be smaller",
}


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
            other = _difference(cls.name, facts, options)
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
    if cls.name in _WITHOUT_TOWER and facts.tower is None:
        others = _WITHOUT_TOWER[cls.name]
        yield {**usual, **others}
    known = {field.name for field in dataclasses.fields(cls)}
    if facts.attention_layers is not None and "prune_before" in known:
        # ranked by the attention of the layer before, or of the layer itself
        for shift in (1, 0):
            layers = (n + shift for n in sorted(facts.attention_layers))
            some = tuple(n for n in layers if 0 < n < facts.decoder_layers)
            for layer in (some, *some):
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


def _difference(name: str, facts: ModelFacts, options: dict[str, Any]) -> str:
    """What a method does otherwise on a model than where it was published; "" if nothing."""
    looked_at = facts.tower or getattr(facts, "observed", None)
    found = []
    if options.get("spatial") is False:  # nothing is read there
        return ""
    if name in _WITHOUT_CLASS_TOKEN and not (looked_at and looked_at.has_cls):
        found.append(_WITHOUT_CLASS_TOKEN[name])
    if name in _WITHOUT_ITS_PLACE and facts.tower is None:
        found.append(_WITHOUT_ITS_PLACE[name])
    return "; ".join(found)


def _sentence(error: Exception | None, method: str, family: str) -> str:
    """An error without names and advice that the table gives, so that methods can share it."""
    text = str(error).split(". Methods that")[0].split("; use a method")[0].replace("\n", " ")
    for within in (f", which {family} does not allow: ", f", and {family} "):
        text = text.replace(within, ", and here " if within.endswith(": ") else ", and this model ")
    return text.removeprefix(f"{method} ")
