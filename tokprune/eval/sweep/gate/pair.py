"""A trial beside the unpruned model, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Row = Mapping[str, Any]

#: a difference of logits counts above this many times what the unpruned model differs from itself
TIMES_NOISE = 10.0
#: and above this part of the largest logit, where its noise was not measured
SHARE_OF_LOGIT = 1e-3


@dataclass
class Pair:
    """Answers of a trial and of the unpruned model, by question."""

    trial: Mapping[str, Any]
    rows: Mapping[str, Row]
    base: Mapping[str, Row]
    noise: Sequence[Mapping[str, Row]]
    blind: Mapping[str, Row]

    @cached_property
    def both(self) -> list[tuple[Row, Row]]:
        """(row, unpruned row) of every question that both have answered."""
        return [
            (row, self.base[item])
            for item, row in self.rows.items()
            if row["status"] == "ok" and item in self.base and self.base[item]["status"] == "ok"
        ]

    @property
    def patched(self) -> bool:
        """Whether a method is at work, and not only a smaller image."""
        return self.trial["method"] is not None

    @cached_property
    def keeps_all(self) -> bool:
        """Whether the budget is as much as the images have."""
        full = [
            base["tokens_in"] / (evidence(base, "images") or 1)
            for _, base in self.both
            if base["tokens_in"] is not None
        ]
        return bool(full) and self.trial["budget"] >= max(full)

    @cached_property
    def flips(self) -> int:
        """Answers that differ, as they stand."""
        return sum(row["answer"] != base["answer"] for row, base in self.both)

    @cached_property
    def moved(self) -> tuple[int, int]:
        """Answers whose first logits differ by more than noise, of those whose are known."""
        pairs = [(_logits(row), _logits(base)) for row, base in self.both]
        known = [(own, plain) for own, plain in pairs if own and plain]
        largest = max((abs(v) for _, plain in known for v in plain.values()), default=0.0)
        least = max(SHARE_OF_LOGIT * largest, TIMES_NOISE * self._noise())
        return sum(_distance(*pair) > least for pair in known), len(known)

    def _noise(self) -> float:
        """By how much the logits of the unpruned model differ from its own at another batch size; 0
        where that was not measured."""
        return max(
            (
                _distance(own, plain)
                for rows in self.noise
                for item, row in rows.items()
                if (own := _logits(row)) and (plain := _logits(self.base.get(item, {})))
            ),
            default=0.0,
        )


def _logits(row: Row) -> dict[int, float]:
    said = row.get("evidence") or {}
    pairs = zip(said.get("ids", ()), said.get("logits", ()))
    return {token: value for token, value in pairs if value is not None}


def _distance(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Largest difference at a token that is among the first of both; infinite where none is."""
    common = one.keys() & other.keys()
    return max((abs(one[token] - other[token]) for token in common), default=float("inf"))


def evidence(row: Row, name: str) -> Any:
    return (row.get("evidence") or {}).get(name)
