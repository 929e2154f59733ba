"""Budgets as typed: a count of visual tokens, or a share of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokprune import words

#: a half, a quarter, a ninth, … of the tokens: what average pooling can do as well
DEFAULT_KEEP = ("1/2", "1/4", "1/9", "1/16", "1/36")


@dataclass(frozen=True)
class Budget:
    """A target. ``text``: as typed; ``count``: tokens per image, or None; ``share``: of an
    image's tokens, or None. One of the two is given."""

    text: str
    count: int | None = None
    share: float | None = None

    def tokens(self, visual_tokens: float) -> float:
        """The target for images of that many tokens."""
        if self.count is not None:
            return float(self.count)
        assert self.share is not None
        return self.share * visual_tokens


def parse_budget(value: Any) -> Budget:
    """``64``, ``"64"``, ``0.11``, ``"11%"``, ``"1/9"``.

    Raises:
        ValueError: anything else, a count below 1, or a share outside (0, 1].
    """
    text, budget = str(value).strip(), words.parse_budget(value)
    if isinstance(budget, int):
        return Budget(text, count=budget)
    return Budget(text, share=budget)


def check_budgets(budgets: tuple[Budget, ...], visual_tokens: int) -> None:
    """No budget is more than an image, or a video, can have.

    Raises:
        ValueError: names the budget and the most there can be.
    """
    for budget in budgets:
        if budget.count is not None and budget.count > visual_tokens:
            raise ValueError(
                f"keep={budget.count} is more than the {visual_tokens} visual tokens that this "
                f"model makes of an image or video here; it should be at most {visual_tokens}"
            )


def tolerance(tokens: float) -> float:
    """How far from a target still counts as hitting it: half a token, or one percent."""
    return max(0.5, 0.01 * tokens)
