"""Requests of lmms-eval, answered by a wrapped model that is observed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts, unwrap_generation_output
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from tokprune.api import patch, unpatch
from tokprune.families import bind
from tokprune.integrations.lmms_eval.arguments import Arguments
from tokprune.integrations.lmms_eval.counts import NUMBERS, Counts, Sample, mean
from tokprune.integrations.lmms_eval.find import find_model
from tokprune.integrations.lmms_eval.images import change_of, changed_messages, changed_visuals
from tokprune.integrations.lmms_eval.likelihood import answer
from tokprune.integrations.lmms_eval.observer import NOTHING, Observer, described

#: a run whose first samples have all failed, this many of them, is given up. (A few that fail can
#: be all that a response cache has left to do.)
GIVE_UP = 8


class Run:
    """A patched model and its answers, until :meth:`close`.

    Raises:
        UnsupportedModelError: the wrapped class holds no model that can be patched.
        ValueError: the method does not fit the model.
    """

    def __init__(self, lm: Any, arguments: Arguments) -> None:
        self.lm = lm
        self.change = change_of(arguments)
        bound = bind(find_model(lm, arguments.base))
        trace = None if arguments.method is None else patch(bound.model, arguments.method)
        self.observer = Observer(bound, trace, resized=arguments.control == "downsample")
        self.samples: list[Sample] = []

    def close(self) -> None:
        """Leave the model as it was."""
        self.observer.stop()
        unpatch(self.observer.bound.model)

    # ------------------------------------------------------------------------- requests

    def generate(
        self, answer: Callable[[list[Any]], Sequence[Any]], requests: Sequence[Any]
    ) -> list[GenerationResult]:
        """One result per request. What fails, fails alone: its text is empty, so that it scores
        as an incorrect answer and no cache keeps it.

        Raises:
            RuntimeError: the first samples have all failed.
        """
        size = self._batch_size()
        start = len(self.samples)
        results: list[GenerationResult] = []
        with (
            tqdm(total=len(requests), disable=self.lm.rank != 0, desc="tokprune") as bar,
            _quiet(type(self.lm)),
        ):
            for at in range(0, len(requests), size):
                results += self._chunk(answer, requests[at : at + size])
                bar.update(min(size, len(requests) - at))
                self._give_up()
        self._report(self.samples[start:])
        return results

    def pass_on(
        self, answer: Callable[[list[Any]], Sequence[Any]], requests: Sequence[Any], kind: str
    ) -> Sequence[Any]:
        """Requests of other kinds, without numbers of their own.

        Raises:
            NotImplementedError: a kind that the control cannot serve.
        """
        if self.change is not None:
            raise NotImplementedError(f"control cannot change the images of {kind} requests")
        self.observer.forget()
        outputs = answer([self._copy(request) for request in requests])
        failed = [s.error for s in self.observer.samples if s.error is not None]
        if failed:
            logger.error(f"tokprune: {len(failed)} answers failed; the first: {failed[0]}")
        elif requests and self.observer.trace is not None and not self.observer.compressed():
            logger.error(f"tokprune: {kind}: {NOTHING}")
        return outputs

    def likelihoods(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Loss and greediness of every continuation, of the model as it is.

        Raises:
            NotImplementedError: requests without images, or a wrapped model without a processor.
            RuntimeError: an image was there, and the method did not see it.
        """
        model, results = self.observer.bound.model, []
        for request in tqdm(requests, disable=self.lm.rank != 0, desc="tokprune"):
            self.observer.forget()
            results.append(answer(self.lm, model, request, self.change))
            seen = self.observer.trace is None or self.observer.compressed()
            if not seen and request.args[2](self._doc(request)):
                raise RuntimeError(f"tokprune: loglikelihood: {NOTHING}")
        return results

    def _doc(self, request: Any) -> Any:
        *_, number, task, split = request.args
        return self.lm.task_dict[task][split][number]

    def _chunk(
        self, answer: Callable[[list[Any]], Sequence[Any]], chunk: Sequence[Any]
    ) -> list[GenerationResult]:
        self.observer.forget()
        problem = None
        outputs: Sequence[Any] = [""] * len(chunk)
        try:
            outputs = answer([self._copy(request) for request in chunk])
        except Exception as error:
            problem = described(error)
        # an error inside generate may have been swallowed on its way
        problem = next((s.error for s in self.observer.samples if s.error), problem)
        if problem is not None and len(chunk) > 1:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # the batch may have been too large
            return [result for request in chunk for result in self._chunk(answer, [request])]
        if problem is None and not self.observer.samples:
            unseen = self.observer.unseen()
            if unseen is not None:
                self.observer.samples = [unseen]
            elif self.observer.trace is not None:
                problem = f"{NOTHING}: generate of the patched model was not called"
        samples = self._samples(len(chunk), problem)
        self.samples += samples
        return [_result(output, sample) for output, sample in zip(outputs, samples, strict=True)]

    def _samples(self, requests: int, problem: str | None) -> list[Sample]:
        """One per request: its own where there is one request, else the mean of the batch, since
        the wrapped model is free to reorder it."""
        rows = self.observer.samples
        sample = mean(rows) if rows else Sample()
        if len(rows) > requests:  # several calls for one answer: their costs add up
            share = len(rows) / requests
            summed = ("macs", "macs_unpruned", "new_tokens", "prefill_seconds", "seconds")
            totals = {n: v * share for n in summed if (v := getattr(sample, n)) is not None}
            sample = replace(sample, **totals)
        return [replace(sample, error=problem)] * requests

    def _copy(self, request: Any) -> Any:
        """A copy whose generation arguments the wrapped model may change (many do, which would
        also change the key under which a response cache stores the answer)."""
        copied = copy.copy(request)
        arguments = [
            copy.deepcopy(value) if isinstance(value, dict) else value for value in request.args
        ]
        if self.change is not None:
            at, changed = (2, changed_visuals) if self.lm.is_simple else (1, changed_messages)
            if len(arguments) > at and callable(function := arguments[at]):
                arguments[at] = changed(function, self.change)
        copied.arguments = tuple(arguments)
        return copied

    def _batch_size(self) -> int:
        size = getattr(self.lm, "batch_size", 1)
        return size if isinstance(size, int) and size > 0 else 1

    # ------------------------------------------------------------------------- reporting

    def _give_up(self) -> None:
        first = self.samples[:GIVE_UP]
        if len(first) == GIVE_UP and all(s.error is not None for s in first):
            raise RuntimeError(
                f"tokprune: the first {GIVE_UP} samples have all failed: {first[0].error}"
            )

    def _report(self, samples: Sequence[Sample]) -> None:
        """Means into the results, failures onto the screen."""
        if not samples:
            return
        failed = [s for s in samples if s.error is not None]
        if failed:
            how = "every one" if len(failed) == len(samples) else f"{len(failed)}"
            logger.error(
                f"tokprune: {how} of {len(samples)} samples failed and counts as an incorrect "
                f"answer; the first: {failed[0].error}"
            )
        means = mean(samples)
        seconds = sum(s.seconds or 0.0 for s in samples)
        tokens = round(sum(s.new_tokens or 0 for s in samples))
        numbers = {n: v for n in NUMBERS if (v := getattr(means, n)) is not None}
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={
                **{f"tokprune_{name}": value for name, value in numbers.items()},
                "tokprune_failed": len(failed) / len(samples),
            },
        )


def _result(output: Any, sample: Sample) -> GenerationResult:
    text, counts = unwrap_generation_output(output)
    counts = counts or TokenCounts()
    if sample.error is not None:
        text = ""
    return GenerationResult(
        text=text,
        token_counts=Counts(
            input_tokens=_either(counts.input_tokens, sample.prompt_tokens),
            output_tokens=_either(counts.output_tokens, sample.new_tokens),
            reasoning_tokens=counts.reasoning_tokens,
            tokprune=sample.to_dict(),
        ),
    )


def _either(reported: int | None, counted: float | None) -> int | None:
    return reported if reported is not None or counted is None else round(counted)


@contextmanager
def _quiet(cls: type) -> Iterator[None]:
    """The wrapped class neither draws a progress bar nor logs its speed for every batch: both are
    done here, for all of them."""
    silent = {"tqdm": lambda *a, **k: tqdm(*a, **{**k, "disable": True}), "log_metrics": _nothing}
    changed = []
    for module in {sys.modules[c.__module__] for c in cls.__mro__ if c.__module__ in sys.modules}:
        if module.__name__ == __name__:
            continue
        for name, stand_in in silent.items():
            if name in vars(module):
                changed.append((module, name, vars(module)[name]))
                setattr(module, name, stand_in)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def _nothing(*_: Any, **__: Any) -> None:
    pass
