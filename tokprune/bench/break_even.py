"""From where on a method pays: the smallest prompt and batch at which it wins beyond noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokprune.bench.gate import Verdict


@dataclass(frozen=True, order=True)
class Load:
    """A point of the grid; ordered by the tokens of the whole batch, smallest first."""

    tokens: int
    batch_size: int
    prompt_tokens: int

    @classmethod
    def of(cls, batch_size: int, prompt_tokens: int) -> Load:
        return cls(batch_size * prompt_tokens, batch_size, prompt_tokens)

    def __str__(self) -> str:
        return f"batch {self.batch_size} × {self.prompt_tokens} tokens"

    def to_dict(self) -> dict[str, int]:
        return {"batch_size": self.batch_size, "prompt_tokens": self.prompt_tokens}


@dataclass(frozen=True)
class BreakEven:
    """``first``: the smallest load that pays, None if none does; ``failing``: larger ones that do
    not; ``measured``: all."""

    first: Load | None
    failing: tuple[Load, ...]
    measured: tuple[Load, ...]

    def __str__(self) -> str:
        if self.first is None:
            return f"never in the range measured ({_range(self.measured)})"
        if self.failing:
            return f"{self.first}, but not at {', '.join(map(str, self.failing))}"
        if self.first == self.measured[0]:
            return f"all measured, from {self.first}"
        return f"from {self.first}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "first": None if self.first is None else self.first.to_dict(),
            "failing": [load.to_dict() for load in self.failing],
            "measured": [load.to_dict() for load in self.measured],
            "text": str(self),
        }


def break_even(verdicts: Sequence[tuple[Load, Verdict]]) -> BreakEven:
    """The break-even point among measured loads. A load pays where its verdict is a speed-up, that
    is beyond the noise of its measurement; "within noise" does not pay.

    Raises:
        ValueError: nothing measured.
    """
    if not verdicts:
        raise ValueError("verdicts is empty; a break-even point needs at least one measurement")
    ordered = sorted(verdicts, key=lambda pair: pair[0])
    paying = [load for load, verdict in ordered if verdict.faster]
    first = paying[0] if paying else None
    failing = [load for load, v in ordered if first is not None and load > first and not v.faster]
    return BreakEven(first, tuple(failing), tuple(load for load, _ in ordered))


def _range(loads: Sequence[Load]) -> str:
    def span(values: list[int]) -> str:
        low, high = min(values), max(values)
        return str(low) if low == high else f"{low}–{high}"

    batches = span([load.batch_size for load in loads])
    return f"batch {batches}, {span([load.prompt_tokens for load in loads])} prompt tokens"
