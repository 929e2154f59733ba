"""Answer a batch in the state that a cell asks for; what fails, fails alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from tokprune.api import compress
from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.sweep.answers import Answer, ask
from tokprune.eval.sweep.loaded_model import Subject
from tokprune.eval.sweep.overlays import overlay_record
from tokprune.eval.sweep.reduced_input import Smaller, blank, each
from tokprune.eval.sweep.trials import Cell
from tokprune.inputs.prompts import PIXELS, encode
from tokprune.trace import Trace
from tokprune.trace.costs import Numbers, traced_numbers, unpruned_numbers


@dataclass(frozen=True)
class Outcome:
    """What became of one question; all but ``error`` is None where it failed too early."""

    answer: Answer | None = None
    numbers: Numbers | None = None
    unpruned: Numbers | None = None
    error: str | None = None
    overlay: dict[str, Any] | None = None


@dataclass
class Batch:
    """Some questions; pictures (or frames) and model inputs are made when first needed, and
    kept."""

    subject: Subject
    benchmark: Benchmark
    items: Sequence[Item]
    _smaller: dict[Smaller, Any] = field(default_factory=dict)

    @cached_property
    def visuals(self) -> list[Any]:
        """Of every question its picture, or the list of its frames."""
        ask = self.benchmark.video if self.benchmark.media == "video" else self.benchmark.image
        return [each(ask(item), lambda picture: picture.convert("RGB")) for item in self.items]

    @cached_property
    def inputs(self) -> Any:
        return self._encode(self.visuals)

    @property
    def pixels(self) -> Any:
        """Pixels, None where they cannot be made (the questions then run one by one)."""
        try:
            return self.inputs[PIXELS[self.benchmark.media]]
        except Exception:
            return None

    @cached_property
    def blind_inputs(self) -> Any:
        return self._encode([each(visual, blank) for visual in self.visuals])

    @cached_property
    def unpruned(self) -> list[Numbers]:
        return unpruned_numbers(self.subject, self.inputs)

    @cached_property
    def singles(self) -> list[Batch]:
        return [Batch(self.subject, self.benchmark, [item]) for item in self.items]

    def inputs_for(self, cell: Cell) -> Any:
        """Model inputs, with smaller or empty pictures where the cell wants them."""
        if cell.blind:
            return self.blind_inputs
        if cell.smaller is None:
            return self.inputs
        if cell.smaller not in self._smaller:
            self._smaller[cell.smaller] = self._shown(cell.smaller)
        return self._smaller[cell.smaller]

    def tokens_at(self, smaller: Smaller) -> float:
        """Mean visual tokens of the pictures or videos made smaller."""
        ids = self._shown(smaller)["input_ids"]
        return float(self.subject.parts.visual(ids).sum()) / len(ids)

    def _shown(self, smaller: Smaller) -> Any:
        return self._encode([smaller(visual) for visual in self.visuals])

    def _encode(self, visuals: list[Any]) -> Any:
        questions = [item.question + self.benchmark.prompt_suffix for item in self.items]
        return encode(
            self.subject.processor, questions, visuals, self.subject.device, self.benchmark.media
        )


@dataclass(frozen=True)
class Examiner:
    """Runs cells on batches. ``gallery``: (item ids, cell ids) to record overlays of."""

    subject: Subject
    benchmark: Benchmark
    gallery: tuple[set[str], set[str]] = (set(), set())

    def examine(self, cell: Cell, batch: Batch) -> list[Outcome]:
        """One outcome per question of the batch. An exception makes the questions run one by one;
        those that raise again have failed."""
        try:
            return self._run(cell, batch)
        except Exception as error:
            if len(batch.items) == 1:
                return [self._failed(batch, error)]
        if self.subject.device.type == "cuda":
            torch.cuda.empty_cache()  # the batch may have been too large
        return [outcome for single in batch.singles for outcome in self.examine(cell, single)]

    def _run(self, cell: Cell, batch: Batch) -> list[Outcome]:
        inputs = batch.inputs_for(cell)
        state: AbstractContextManager[Trace | None] = (
            nullcontext() if cell.method is None else compress(self.subject.model, cell.method)
        )
        with state as trace:
            answers = ask(self.subject, inputs, self.benchmark.max_new_tokens)
        unpruned = batch.unpruned
        if trace is not None:
            if trace.last is None:
                raise RuntimeError("the method saw no picture and no video: nothing was compressed")
            numbers = traced_numbers(trace.last)
        else:
            numbers = unpruned if cell.smaller is None else unpruned_numbers(self.subject, inputs)
        return [
            Outcome(answer, own, plain, overlay=self._overlay(cell, trace, row, item.id))
            for row, (item, answer, own, plain) in enumerate(
                zip(batch.items, answers, numbers, unpruned, strict=True)
            )
        ]

    def _overlay(
        self, cell: Cell, trace: Trace | None, row: int, item: str
    ) -> dict[str, Any] | None:
        items, cells = self.gallery
        if trace is None or item not in items or cell.id not in cells:
            return None
        return overlay_record(trace, row, item, cell.id)

    def _failed(self, batch: Batch, error: Exception) -> Outcome:
        text = " ".join(str(error).split())
        try:
            unpruned = batch.unpruned[0]
        except Exception:  # the picture cannot even be read
            unpruned = None
        return Outcome(unpruned=unpruned, error=f"{type(error).__name__}: {text[:500]}")


def make_row(
    row: str, cell: Cell, item: Item, outcome: Outcome, benchmark: Benchmark, now: float
) -> dict[str, Any]:
    """The line of rows.jsonl for an outcome. A failed question scores 0."""
    plain, own, answer = outcome.unpruned, outcome.numbers, outcome.answer
    error, score = outcome.error, 0.0
    if answer is not None and error is None:
        score = float(benchmark.score(item, answer.text))
    known: Mapping[str, Any] = {
        "tokens_in": None if plain is None else int(plain.tokens_last),
        "tokens_last": None if own is None else own.tokens_last,
        "tokens_mean": None if own is None else round(own.tokens_mean, 4),
        "macs": None if own is None else own.macs,
        "macs_unpruned": None if plain is None else plain.macs,
        "kv_bytes": None if own is None else own.kv_bytes,
        "kv_bytes_unpruned": None if plain is None else plain.kv_bytes,
        "prompt_tokens": None if plain is None else plain.prompt_tokens,
    }
    return {
        "row": row,
        "cell": cell.id,
        "item": item.id,
        "image": item.image_id,
        "task": item.task,
        "question": item.question,
        "answers": list(item.answers),
        "answer": "" if answer is None else answer.text,
        "score": score,
        "status": "failed" if error is not None else "ok",
        "error": error,
        **known,
        "new_tokens": 0 if answer is None else answer.new_tokens,
        "seconds": None if answer is None else round(answer.seconds, 6),
        "time": round(now, 3),
    }
