"""Answer a batch in the state that a trial asks for; what fails, fails alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from tokprune.api import compress
from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.sweep.answers import Answer, generate_answers
from tokprune.eval.sweep.evidence import Evidence, input_digest, kept_digests
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.eval.sweep.overlays import overlay_record
from tokprune.eval.sweep.places import kept_places
from tokprune.eval.sweep.reduced_input import ReducedInput, blank, each
from tokprune.eval.sweep.trials import Trial
from tokprune.inputs.pictures import read_picture
from tokprune.inputs.prompts import encode
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
    evidence: Evidence | None = None


@dataclass
class Batch:
    """Some questions; images (or frames) and model inputs are made when first needed, and
    kept."""

    loaded: LoadedModel
    benchmark: Benchmark
    items: Sequence[Item]
    _reduced: dict[ReducedInput, Any] = field(default_factory=dict)

    @cached_property
    def visuals(self) -> list[Any]:
        """Of every question its images, or the frames of its video."""
        video = self.benchmark.media == "video"
        visual_of = self.benchmark.video if video else self.benchmark.images
        return [
            each(visual_of(item), partial(read_picture, name=f"item {item.id!r}"))
            for item in self.items
        ]

    @property
    def shown(self) -> list[int]:
        """Of every question the number of its images; 1 for a video."""
        video = self.benchmark.media == "video"
        return [len(own) if isinstance(own, list) and not video else 1 for own in self.visuals]

    @cached_property
    def inputs(self) -> Any:
        return self._encode(self.visuals)

    @property
    def pixels(self) -> Any:
        """Pixels, None where they cannot be made (the questions then run one by one)."""
        try:
            family, video = self.loaded.family, self.benchmark.media == "video"
            return self.inputs[family.video_pixels if video else family.pixels]
        except Exception:
            return None

    @cached_property
    def blind_inputs(self) -> Any:
        return self._encode([each(visual, blank) for visual in self.visuals])

    @cached_property
    def unpruned(self) -> list[Numbers]:
        return unpruned_numbers(self.loaded, self.inputs)

    @cached_property
    def digests(self) -> list[str]:
        """Of every question what it shows and asks."""
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        return [
            input_digest(row[real.bool()].tolist(), own if isinstance(own, list) else [own])
            for row, real, own in zip(ids, mask, self.visuals, strict=True)
        ]

    @cached_property
    def singles(self) -> list[Batch]:
        return [Batch(self.loaded, self.benchmark, [item]) for item in self.items]

    def inputs_for(self, trial: Trial) -> Any:
        """Model inputs, with smaller or empty images where the trial wants them."""
        if trial.blind:
            return self.blind_inputs
        if trial.reduced_input is None:
            return self.inputs
        if trial.reduced_input not in self._reduced:
            self._reduced[trial.reduced_input] = self._shown(trial.reduced_input)
        return self._reduced[trial.reduced_input]

    def tokens_at(self, reduced: ReducedInput) -> float:
        """Mean visual tokens of an image or a video made smaller."""
        visual = self.loaded.family.placeholders(self.loaded.parts, self._shown(reduced)) > 0
        return float(visual.sum()) / sum(self.shown)

    def _shown(self, reduced: ReducedInput) -> Any:
        return self._encode([reduced(visual) for visual in self.visuals])

    def _encode(self, visuals: list[Any]) -> Any:
        questions = [item.question + self.benchmark.prompt_suffix for item in self.items]
        return encode(
            self.loaded.processor, questions, visuals, self.loaded.device, self.benchmark.media,
            self.loaded.model,
        )  # fmt: skip


@dataclass(frozen=True)
class Evaluator:
    """Runs trials on batches. ``gallery``: (item ids, trial ids) to record overlays of; ``placed``:
    items of which the places of kept tokens are recorded."""

    loaded: LoadedModel
    benchmark: Benchmark
    gallery: tuple[set[str], set[str]] = (set(), set())
    placed: frozenset[str] = frozenset()

    def evaluate(self, trial: Trial, batch: Batch) -> list[Outcome]:
        """One outcome per question of the batch. An exception makes the questions run one by one;
        those that raise again have failed."""
        try:
            return self._run(trial, batch)
        except Exception as error:
            if len(batch.items) == 1:
                return [self._failed(batch, error)]
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()  # the batch may have been too large
        return [outcome for single in batch.singles for outcome in self.evaluate(trial, single)]

    def _run(self, trial: Trial, batch: Batch) -> list[Outcome]:
        inputs = batch.inputs_for(trial)
        state: AbstractContextManager[Trace | None] = (
            nullcontext() if trial.method is None else compress(self.loaded.model, trial.method)
        )
        with state as trace:
            answers = generate_answers(self.loaded, inputs, self.benchmark.max_new_tokens)
        unpruned = batch.unpruned
        if trace is not None:
            if trace.last is None:
                raise RuntimeError("the method saw no image and no video: nothing was compressed")
            numbers = traced_numbers(trace.last)
            kept: list[str] | list[None] = kept_digests(trace.last)
        else:
            kept = [None] * len(answers)
            numbers = (
                unpruned if trial.reduced_input is None else unpruned_numbers(self.loaded, inputs)
            )
        changed = trial.blind or trial.reduced_input is not None
        shown = [None] * len(answers) if changed else batch.digests
        return [
            Outcome(
                answer, cost, plain, overlay=self._overlay(trial, trace, row, item.id),
                evidence=Evidence(
                    shown[row], kept[row], answer.cache, answer.ids, answer.logits, answer.finite,
                    batch.shown[row], self._places(trace, row, item.id),
                ),
            )
            for row, (item, answer, cost, plain) in enumerate(
                zip(batch.items, answers, numbers, unpruned, strict=True)
            )
        ]  # fmt: skip

    def _overlay(
        self, trial: Trial, trace: Trace | None, row: int, item: str
    ) -> dict[str, Any] | None:
        items, trials = self.gallery
        if trace is None or item not in items or trial.id not in trials:
            return None
        return overlay_record(trace, row, item, trial.id)

    def _places(self, trace: Trace | None, row: int, item: str) -> dict[str, list[int]] | None:
        if trace is None or trace.last is None or item not in self.placed:
            return None
        return kept_places(trace.last, row)

    def _failed(self, batch: Batch, error: Exception) -> Outcome:
        text = " ".join(str(error).split())
        try:
            unpruned = batch.unpruned[0]
        except Exception:  # the image cannot even be read
            unpruned = None
        return Outcome(unpruned=unpruned, error=f"{type(error).__name__}: {text[:500]}")


def numbers_of(outcome: Outcome) -> dict[str, Any]:
    """What a row says of costs; None where it is not known."""
    numbers, unpruned, answer = outcome.numbers, outcome.unpruned, outcome.answer
    return {
        "tokens_in": None if unpruned is None else int(unpruned.tokens_last),
        "tokens_last": None if numbers is None else numbers.tokens_last,
        "tokens_mean": None if numbers is None else round(numbers.tokens_mean, 4),
        "macs": None if numbers is None else numbers.macs,
        "macs_unpruned": None if unpruned is None else unpruned.macs,
        "kv_bytes": None if numbers is None else numbers.kv_bytes,
        "kv_bytes_unpruned": None if unpruned is None else unpruned.kv_bytes,
        "prompt_tokens": None if unpruned is None else unpruned.prompt_tokens,
        "new_tokens": 0 if answer is None else answer.new_tokens,
        "seconds": None if answer is None else round(answer.seconds, 6),
        "evidence": None if outcome.evidence is None else outcome.evidence.to_dict(),
    }
