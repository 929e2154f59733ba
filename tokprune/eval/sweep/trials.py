"""Trials: a variant at a budget, the points of a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokprune.eval.sweep.budgets import Budget
from tokprune.eval.sweep.calibrate import Calibrator, Matched
from tokprune.eval.sweep.reduced_input import REDUCED_INPUTS, ReducedInput
from tokprune.eval.sweep.variants import AS_PUBLISHED, UNBUDGETED, Turnable, Variant
from tokprune.methods import Method, make_method
from tokprune.methods.composed import Composed
from tokprune.methods.setting import as_tuples

#: batch size of the repetition, and the one for sweeps that run at that size themselves
_NOISE_BATCHES = (1, 8)


@dataclass(frozen=True)
class Trial:
    """A variant at a budget, with a seed."""

    #: of ``trials`` in run.json
    entry: dict[str, Any]
    #: None: the model stays unpatched
    method: Method | None = None

    @property
    def id(self) -> str:
        name: str = self.entry["trial"]
        return name

    @property
    def runs(self) -> bool:
        return bool(self.entry["status"] == "ok")

    @property
    def reduced_input(self) -> ReducedInput | None:
        """What is done to images or videos, for ``downsample`` and ``frames``."""
        if self.entry["variant"] not in REDUCED_INPUTS:
            return None
        return ReducedInput.of(self.entry["options"])

    @property
    def blind(self) -> bool:
        """Whether the image is replaced by an empty one."""
        return bool(self.entry["variant"] == "blind")

    @classmethod
    def stored(cls, entry: dict[str, Any]) -> Trial:
        """A trial as run.json has it."""
        method = None
        if entry["method"] is not None and entry["status"] == "ok":
            method = make_method(entry["method"], **as_tuples(entry["options"]))
        return cls(entry, method)


def json_options(method: Method) -> dict[str, Any]:
    """All options of a method in JSON types; of a composition its methods, each with all of its."""
    if isinstance(method, Composed):
        parts = [{"method": part.name, "options": json_options(part)} for part in method.methods]
        return {"methods": parts}
    options: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(method)))
    if options["video_unit"] == "video":  # the default, and no matter for images
        del options["video_unit"]
    if options["rectify"] is None:
        del options["rectify"]
    return options


@dataclass(frozen=True)
class TrialMaker:
    """Makes the trials of a sweep."""

    calibrator: Calibrator
    #: fields that all of them share: dtype, batch size, match
    common: Mapping[str, Any]

    def none(self, trial: str = "none", noise: bool = False, **changes: Any) -> Trial:
        """The unpruned model."""
        tokens = _short(self.calibrator.visual_tokens, 3)
        return Trial({
            **self._entry(Variant(None, True, unpatched="none"), trial, tokens, tokens),
            "repr": "unpruned", "noise": noise,
            "calibrated": _calibrated(tokens, tokens), **changes,
        })  # fmt: skip

    def blind(self) -> Trial:
        """The unpruned model on an empty image: what the questions alone give away."""
        return self.none("blind", variant="blind", repr="blind: a uniform grey image")

    def noise(self, dtype: str, batch_size: int) -> list[Trial]:
        """The unpruned model against itself: at another batch size, and at another dtype."""
        batch = next(n for n in _NOISE_BATCHES if n != batch_size)
        other = "bfloat16" if dtype == "float32" else "float32"
        return [
            self.none(f"none.batch{batch}", noise=True, batch_size=batch),
            self.none(f"none.{other}", noise=True, dtype=other),
        ]

    def id_of(self, variant: Turnable, budget: Budget, seed: int) -> str:
        """``todre@64``, ``random@64.s1``."""
        name = f"{variant.name}@{budget.tokens(self.calibrator.visual_tokens):.6g}"
        return f"{name}.s{seed}" if seed else name

    def make(self, variant: Turnable, budget: Budget, seed: int) -> Trial:
        """A variant at a budget; a method is matched to it by measuring."""
        tokens = _short(budget.tokens(self.calibrator.visual_tokens), 6)
        entry = self._entry(variant, self.id_of(variant, budget, seed), tokens, budget.text, seed)
        if variant.method is None:
            reduced = self.calibrator.match_reduced_input(variant.unpatched, budget)
            options = reduced.reduced_input.options
            values = ", ".join(f"{name}={value:.4g}" for name, value in options.items())
            return Trial({
                **entry, "options": options, "repr": f"{variant.name}({values})",
                "calibrated": _calibrated(reduced.tokens, reduced.tokens), "reason": reduced.reason,
                "status": "ok" if reduced.reached else "unreachable",
            })  # fmt: skip
        return self._matched(entry, variant, self.calibrator.match_budget(variant, budget, seed))

    def as_published(self, variant: Variant) -> Trial:
        """A variant with its options as they are; its budget is what they are measured to leave."""
        try:
            method = variant.published_method()
            method.plan(self.calibrator.loaded.facts)
            matched = Matched(method, self.calibrator.measure(method))
        except ValueError as error:
            matched = Matched(None, None, str(error))
        tokens = self.calibrator.visual_tokens
        if matched.measured is not None:
            tokens = getattr(matched.measured, self.common["match"])
        entry = self._entry(variant, variant.name, round(tokens, 6), AS_PUBLISHED)
        return self._matched(entry, variant, matched)

    def _entry(
        self, variant: Turnable, trial: str, budget: float, text: str | float, seed: int = 0
    ) -> dict[str, Any]:
        return {
            "trial": trial, "variant": variant.name, "method": variant.method, "options": {},
            "repr": variant.name, "control": variant.control, "budget": budget,
            "budget_text": text, **self.common, "seed": seed, "noise": False, "status": "ok",
            "reason": None, "calibrated": None,
        }  # fmt: skip

    @staticmethod
    def _matched(entry: dict[str, Any], variant: Turnable, matched: Matched) -> Trial:
        if matched.reason is not None:
            entry |= {"status": "unreachable", "reason": matched.reason}
        if matched.method is None:
            entry["options"] = json.loads(json.dumps(dict(variant.options)))
            return Trial(entry)
        entry |= {"options": json_options(matched.method), "repr": repr(matched.method)}
        assert matched.measured is not None
        entry["calibrated"] = _calibrated(matched.measured.last, matched.measured.mean)
        return Trial(entry, matched.method)


def _calibrated(last: float, mean: float) -> dict[str, float]:
    return {"tokens_last": round(last, 3), "tokens_mean": round(mean, 3)}


def _short(tokens: float, digits: int) -> int | float:
    return int(tokens) if tokens == int(tokens) else round(tokens, digits)


def build_trials(
    maker: TrialMaker,
    variant: Variant,
    budgets: Sequence[Budget],
    seeds: Sequence[int],
    known: Mapping[str, Trial],
) -> list[Trial]:
    """A variant at every budget, a stochastic one once per seed. ``known`` trials are not measured
    again."""
    if variant.name in UNBUDGETED:
        return [known.get(variant.name) or getattr(maker, variant.name)()]
    if variant.as_published:
        return [known.get(variant.name) or maker.as_published(variant)]
    return [
        known.get(maker.id_of(variant, budget, seed)) or maker.make(variant, budget, seed)
        for budget in budgets
        for seed in (seeds if variant.stochastic else (0,))
    ]
