"""What a setting has to keep to: so many visual tokens, or so much time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from tokprune.eval.sweep.budgets import Budget, parse_budget
from tokprune.eval.sweep.evaluator import Batch
from tokprune.eval.sweep.latency import measure_latency
from tokprune.eval.sweep.trials import Trial, TrialMaker
from tokprune.eval.sweep.variants import Turnable
from tokprune.eval.tune.candidate import Candidate

#: budgets that a limit of time is sought among, and measurements of each
_LADDER, _ROUNDS = 16, 3


class Target(Protocol):
    """A budget, and the way to meet it."""

    @property
    def name(self) -> str:
        """For files and studies."""

    @property
    def text(self) -> str:
        """For people."""

    def match(self, variant: Turnable) -> Trial:
        """The variant at the budget; of status "unreachable" where there is no such setting."""


@dataclass(frozen=True)
class TokenTarget:
    """Visual tokens on the mean over the decoder layers, matched as a sweep matches them."""

    maker: TrialMaker
    budget: Budget

    @property
    def name(self) -> str:
        return f"tokens-{self.budget.text.replace('/', '-').replace('%', 'pc')}"

    @property
    def text(self) -> str:
        tokens = self.budget.tokens(self.maker.calibrator.visual_tokens)
        return f"{tokens:.4g} of {self.maker.calibrator.visual_tokens:.4g} tokens"

    def match(self, variant: Turnable) -> Trial:
        return matched(self.maker, variant, self.budget)


@dataclass(frozen=True)
class LatencyTarget:
    """Seconds per answer: the most tokens with which a setting stays within them."""

    maker: TrialMaker
    seconds: float
    #: a question, and the longest answer to it
    question: Batch
    max_new_tokens: int

    @property
    def name(self) -> str:
        return f"latency-{self.seconds * 1000:g}ms"

    @property
    def text(self) -> str:
        return f"{self.seconds * 1000:g} ms"

    def match(self, variant: Turnable) -> Trial:
        """Bisects the budgets between all tokens and one."""
        full = self.maker.calibrator.visual_tokens
        ladder = sorted({max(1, round(full ** (n / _LADDER))) for n in range(_LADDER + 1)})
        low, high, best = 0, len(ladder) - 1, None
        reason: Any = None
        while low <= high:
            middle = (low + high) // 2
            trial = matched(self.maker, variant, parse_budget(ladder[middle]))
            seconds = self._seconds(trial) if trial.runs else math.inf
            if seconds <= self.seconds:
                best, low = trial, middle + 1
            else:
                reason = trial.entry["reason"] or f"{seconds * 1000:.4g} ms at {ladder[middle]}"
                high = middle - 1
        if best is None:
            failed = matched(self.maker, variant, parse_budget(1)).entry
            reason = f"nothing within {self.text}: {reason}"
            return Trial({**failed, "status": "unreachable", "reason": reason})
        return best

    def _seconds(self, trial: Trial) -> float:
        timed = measure_latency(
            self.maker.calibrator.loaded, self.question.inputs, [trial], _ROUNDS,
            self.max_new_tokens,
        )["trials"][trial.id]  # fmt: skip
        return float(timed["total"]["median"])


def matched(maker: TrialMaker, variant: Turnable, budget: Budget) -> Trial:
    """A variant at a budget of tokens. What fails in it, fails alone: options that were never
    tried together can be a poor idea in ways that no check foresees."""
    if isinstance(variant, Candidate):
        variant = variant.seeking(budget, maker.calibrator.visual_tokens)
    try:
        return maker.make(variant, budget, 0)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Trial({
            "trial": "", "variant": variant.name, "method": variant.method, "options": {},
            "repr": variant.name, "control": variant.control,
            "budget": budget.tokens(maker.calibrator.visual_tokens), "budget_text": budget.text,
            **maker.common, "seed": 0, "noise": False, "status": "unreachable", "reason": reason,
            "calibrated": None,
        })  # fmt: skip
