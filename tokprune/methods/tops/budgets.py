"""A nominal budget T of three steps: 2·T enter the decoder, T and T/4 are left after its cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokprune.methods.base import resolve_keep
from tokprune.methods.depth import last_steps
from tokprune.methods.options import Budget, PruneBefore
from tokprune.methods.schedule import of_entered
from tokprune.methods.scoring import DecoderScorer

_LAYERS = (12, 24)


@dataclass(frozen=True)
class NominalBudget(DecoderScorer):
    """What is left after each step; options as of :class:`TOPS`."""

    budget_options = frozenset({"keep", "input_keep"})

    prune_before: PruneBefore = _LAYERS
    input_keep: Budget | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        keep, entering, steps = self.keep, self.entering, len(self.steps)
        if steps > 2 and not isinstance(keep, Sequence):
            raise ValueError(
                f"keep={keep!r} stands for at most 2 cuts; with {steps} layers in prune_before it "
                f"should be a sequence of {steps} budgets"
            )
        for budget in self.budgets:
            share = isinstance(budget, float)
            alike = share == isinstance(entering, float)
            if (share and not alike) or (alike and budget > entering):
                raise ValueError(
                    f"keep={keep!r} and input_keep={self.input_keep!r} should both be counts or "
                    "both fractions of an image's patches, and input_keep no less than keep"
                )

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        return last_steps(_LAYERS, decoder_layers, ranked_before=True)

    @property
    def budgets(self) -> tuple[int | float, ...]:
        """What is left after each cut: counts, or fractions of an image's patches."""
        if isinstance(self.keep, Sequence):
            return tuple(self.keep)
        last = max(1, self.keep // 4) if isinstance(self.keep, int) else self.keep / 4
        return (self.keep, last)[: len(self.steps)]

    @property
    def entering(self) -> int | float:
        """What enters the decoder: a count, or fraction of an image's patches."""
        if self.input_keep is not None:
            return self.input_keep
        first = 2 * self.budgets[0]
        return first if isinstance(first, int) else min(1.0, first)

    def enters(self, tokens: int) -> int:
        return resolve_keep(self.entering, tokens)

    def count(self, step: int, tokens: int) -> int:
        budget = of_entered(self.budgets[step], self.entering)
        return resolve_keep(budget, tokens) if tokens else 0
