"""What is known of one answer, in the form that lmms-eval logs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from lmms_eval.api.instance import TokenCounts


@dataclass(frozen=True)
class Sample:
    """One answered question; names and units as in a row of a run folder (docs/results.md).

    ``images``: images and videos in the prompt; ``tokens_in``: visual tokens before compression;
    ``prefill_seconds``: from the start of ``generate`` to the end of its first forward pass, and
    ``seconds`` to its end, both divided by the rows of its batch. None: not known.
    """

    images: float | None = None
    tokens_in: float | None = None
    tokens_last: float | None = None
    tokens_mean: float | None = None
    macs: float | None = None
    macs_unpruned: float | None = None
    kv_bytes: float | None = None
    kv_bytes_unpruned: float | None = None
    prompt_tokens: float | None = None
    new_tokens: float | None = None
    prefill_seconds: float | None = None
    seconds: float | None = None
    error: str | None = None

    @property
    def status(self) -> str:
        return "ok" if self.error is None else "failed"

    def to_dict(self) -> dict[str, Any]:
        """Numbers rounded as in a run folder; ``status`` is "ok" or "failed"."""
        digits = {"tokens_mean": 4, "prefill_seconds": 6, "seconds": 6}
        numbers = {
            name: round(value, digits[name]) if name in digits and value is not None else value
            for name, value in dataclasses.asdict(self).items()
        }
        error = numbers.pop("error")
        return {**numbers, "status": self.status, "error": error}


NUMBERS = tuple(f.name for f in dataclasses.fields(Sample) if f.name != "error")


def mean(samples: Sequence[Sample]) -> Sample:
    """The mean of every number, of the samples where it is known; the first error."""
    means: dict[str, Any] = {}
    for name in NUMBERS:
        values = [v for s in samples if (v := getattr(s, name)) is not None]
        means[name] = values[0] if len(values) == 1 else fmean(values) if values else None
    return Sample(**means, error=next((s.error for s in samples if s.error), None))


@dataclass
class Counts(TokenCounts):
    """lmms-eval's token counts of an answer, and ours under ``"tokprune"``."""

    tokprune: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "tokprune": self.tokprune}
