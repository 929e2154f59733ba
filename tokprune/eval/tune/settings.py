"""What to tune."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokprune.errors import did_you_mean
from tokprune.eval.sweep.budgets import Budget, parse_budget
from tokprune.eval.sweep.settings import Settings
from tokprune.methods import available_methods


@dataclass(frozen=True)
class TuneSettings:
    """Everything that decides what is tuned, and on what it is reported.

    Args:
        model: folder or hub name.
        out: folder; made where missing, gone on with where it holds the same study.
        tokens: budgets of visual tokens, mean over the decoder layers, as a sweep's ``keep``.
        latency: budgets of seconds per answer, as a sweep times them.
        trials: what the search tries at each budget, beside the published settings.
        methods: names that may be used; empty: every method for images (or videos), controls too.
        benchmark: name or file of questions.
        split: questions to choose by; None: "validation" where there is one, else the first.
        held_out: questions to report on, which are never seen before: a split, or the share of the
            images that is put aside (where that is a number, the rest is to choose by). None:
            "test" where there is one, else the next split, else half of the images.
        limit, held_out_limit: most questions of each, balanced over the tasks.
        rivals: published settings, the best on the questions to choose by, that are answered on the
            others as well, and that the tuned setting has to beat there, each of them.
        seed: of everything that is drawn.
        population: tried together, so that the vision encoder runs once for them where it can.
        sweep: further settings of :class:`tokprune.eval.sweep.Settings` (``device``, ``dtype``,
            ``batch_size``, those of files, …).

    Raises:
        ValueError: a value that cannot be used; names it and says what would be right.
    """

    model: str
    out: str
    tokens: tuple[Any, ...] = ()
    latency: tuple[float, ...] = ()
    trials: int = 50
    methods: tuple[str, ...] = ()
    benchmark: str = "mini"
    split: str | None = None
    held_out: str | float | None = None
    limit: int | None = None
    held_out_limit: int | None = None
    rivals: int = 3
    seed: int = 0
    population: int = 12
    fresh: bool = False
    sweep: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokens and not self.latency:
            raise ValueError("tokens or latency is missing; give at least one budget, such as 64")
        for value in self.latency:
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"latency={value!r} should be a number of seconds above 0")
        for name in ("trials", "limit", "held_out_limit", "rivals", "population"):
            value = getattr(self, name)
            if value is None and "limit" in name:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} should be a whole number, at least 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r} should be a whole number, at least 0")
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out!r} should be a share between 0 and 1")
        known = available_methods()
        for name in self.methods:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ValueError(f"method {name!r} is unknown; known: {', '.join(known)}.{hint}")
        self.budgets()
        self.sweeping("none")

    def budgets(self) -> tuple[Budget, ...]:
        """Budgets of tokens, each once."""
        parsed = [parse_budget(value) for value in self.tokens]
        return tuple({(b.count, b.share): b for b in parsed}.values())

    def sweeping(self, *methods: Any, **changes: Any) -> Settings:
        """The settings of a sweep of these methods over the questions to choose by."""
        common: dict[str, Any] = {
            "model": self.model, "out": self.out, "benchmark": self.benchmark, "limit": self.limit,
            "methods": methods, "keep": tuple(b.text for b in self.budgets()) or (1,),
            "controls": False, "noise": False, "latency": False, "fresh": self.fresh,
        }  # fmt: skip
        return Settings(**{**common, **self.sweep, **changes})

    def identity(self) -> dict[str, Any]:
        """What a study that goes on has in common with how it was begun."""
        return {
            "methods": list(self.methods), "rivals": self.rivals, "seed": self.seed,
            "population": self.population,
        }  # fmt: skip
