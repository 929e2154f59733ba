"""What a second question costs beside a first one, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokprune.eval.report.resampling import Resampler, interval
from tokprune.eval.report.statistics import Flips, flips, holm
from tokprune.files import parse_json, read_object

#: in a run folder
HEADER_FILE, ROWS_FILE = "second_question.json", "second_question.jsonl"
#: a carry-over below this, by the upper end of its interval, on so many pairs, is safe
SAFE, ENOUGH = 0.01, 500

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Carried:
    """A trial on second questions. All but ``p`` and ``dependence`` are accuracies in [0, 1] on the
    same ordered pairs, with equal weights.

    ``alone``: tokens chosen under the question itself; ``after``: under the first one, on its
    cache; ``unpruned``: the unpruned model after the same history; ``first_loss``: what
    compression costs a question that is asked alone; ``second_loss``: a second one;
    ``carry_over``: the second less the first, which is what choosing under another question costs,
    with its 95 % interval (images are drawn); ``flips``: of answers between the unpruned model and
    this one, both after the history, ``p``: McNemar's, adjusted for the number of trials (Holm);
    ``dependence``: share of the kept tokens that another question changes (0: the method does not
    read it).
    """

    trial: str
    pairs: int
    images: int
    failed: int
    unpruned: float
    alone: float
    after: float
    first_loss: float
    second_loss: float
    carry_over: float
    interval: tuple[float, float]
    flips: Flips
    p: float
    dependence: float

    @property
    def safe(self) -> bool | None:
        """Whether second questions lose less than a point; None: too few pairs to say so."""
        if self.pairs < ENOUGH:
            return None
        return self.interval[1] < SAFE


@dataclass(frozen=True)
class SecondQuestions:
    """All trials of a run that were asked."""

    #: "none" or "own"
    history: str
    carried: tuple[Carried, ...]


def read_second_questions(
    folder: str | Path, draws: int = 4000, seed: int = 0
) -> SecondQuestions | None:
    """What ``tokprune second-question`` wrote into a run folder; None where it was not run.

    Raises:
        ValueError: a file is damaged.
    """
    header, rows = Path(folder) / HEADER_FILE, Path(folder) / ROWS_FILE
    if not (header.is_file() and rows.is_file()):
        return None
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    found = [parse_json(line) for line in lines if line.endswith("\n")]
    carried = measure(found, draws, seed)
    return SecondQuestions(read_object(header)["history"], carried) if carried else None


def measure(
    rows: Sequence[Mapping[str, Any]], draws: int = 4000, seed: int = 0
) -> tuple[Carried, ...]:
    """Of every trial but the unpruned one.

    Args:
        rows: of ``second_question.jsonl``.
        draws, seed: of the bootstrap over images.
    """
    score = {(r["trial"], r["first"], r["second"]): float(r["score"]) for r in rows}
    overlap = {(r["trial"], r["first"], r["second"]): r["overlap"] for r in rows}
    image = {r["second"]: r["image"] for r in rows}
    found = []
    for trial in dict.fromkeys(r["trial"] for r in rows if r["trial"] != "none"):
        own = [(a, b) for t, a, b in score if t == trial and a != b]
        if not own:
            continue
        columns = np.array([
            [score["none", b, b], score["none", a, b], score[trial, b, b], score[trial, a, b]]
            for a, b in own
        ])  # fmt: skip
        plain_alone, plain_after, alone, after = columns.T
        gap = (plain_after - after) - (plain_alone - alone)
        carry = float(gap.mean())
        resampler = Resampler([image[b] for _, b in own], [""] * len(own), draws=draws, seed=seed)
        _, samples = resampler.task_means(gap[:, None], [""])
        changed = flips(plain_after, after)
        kept = [value for a, b in own if (value := overlap[trial, a, b]) is not None]
        failed = sum(r["error"] is not None for r in rows if r["trial"] == trial)
        found.append(Carried(
            trial, len(own), len({image[b] for _, b in own}), failed, float(plain_after.mean()),
            float(alone.mean()), float(after.mean()), float((plain_alone - alone).mean()),
            float((plain_after - after).mean()), carry, interval(samples[:, 0, 0], carry),
            changed, changed.p, 1 - float(np.mean(kept)) if kept else float("nan"),
        ))  # fmt: skip
    adjusted = holm([own.p for own in found])
    return tuple(replace(own, p=float(p)) for own, p in zip(found, adjusted, strict=True))
