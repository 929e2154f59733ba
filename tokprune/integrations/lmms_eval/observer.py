"""Observe a model that generates: its inputs, how many tokens were left, how long it took."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokprune.engine.family import BoundModel
from tokprune.engine.model import ModelFacts
from tokprune.eval.sweep.answers import end_tokens, now, until_end
from tokprune.integrations.lmms_eval.counts import Sample
from tokprune.trace import PrefillTrace, Trace
from tokprune.trace.costs import (
    Numbers,
    images_of_rows,
    traced_numbers,
    unpruned_numbers,
    unpruned_of,
)

#: arguments of ``generate`` that hold images or videos, beside those of the family
_IMAGES = ("images", "image_embeds")

NOTHING = "RuntimeError: the method saw no image: nothing was compressed"


def described(error: BaseException) -> str:
    """``Type: text`` of an error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


class _FirstForward:
    """The moment at which the first forward pass after :meth:`start` has ended."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.ended: float | None = None
        self._handle: Any = None

    def start(self) -> float:
        self._handle = self.model.register_forward_hook(self._hook)
        return now(self.device)

    def _hook(self, *_: Any) -> None:
        self.ended = now(self.device)
        self.stop()

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


@dataclass
class Observer:
    """Stands in for ``model.generate`` until :meth:`stop`; what passes through is unchanged."""

    bound: BoundModel
    #: of the method at work, None without one
    trace: Trace | None = None
    #: the images are smaller than the task has them, so that what they would cost at full size is
    #: known only where all images cost the same
    resized: bool = False

    def __post_init__(self) -> None:
        #: one per row of every call since :meth:`forget`; a call that raised leaves one with its
        #: error
        self.samples: list[Sample] = []
        self._prefills = 0
        self._generate = self.bound.model.generate
        self.bound.model.generate = self._observed

    def stop(self) -> None:
        """Take the stand-in away."""
        vars(self.bound.model).pop("generate", None)

    def forget(self) -> None:
        self.samples = []
        self._prefills = 0 if self.trace is None else self.trace.prefills

    def compressed(self) -> bool:
        """Whether a method has run since :meth:`forget`."""
        return self.trace is not None and self.trace.prefills > self._prefills

    def unseen(self) -> Sample | None:
        """What is known where ``generate`` was never called: a prefill that ran all the same."""
        if not self.compressed():
            return None
        assert self.trace is not None
        assert self.trace.last is not None
        return _traced(self.trace.last)[-1]

    # ------------------------------------------------------------------------- one call

    def _observed(self, *args: Any, **kwargs: Any) -> Any:
        device = self.bound.model.device
        prefills = 0 if self.trace is None else self.trace.prefills
        first = _FirstForward(self.bound.model, device)
        start = first.start()
        try:
            out = self._generate(*args, **kwargs)
        except Exception as error:
            self.samples.append(Sample(error=described(error)))
            raise
        finally:
            first.stop()
        seconds = now(device) - start
        inputs = self._inputs(args, kwargs)
        rows = self._rows(inputs, prefills)
        new = _new_tokens(out, inputs, self._ends(kwargs))
        rows = rows or [Sample()] * max(len(new), 1)
        prefill = None if first.ended is None else (first.ended - start) / len(rows)
        each = len(new) // len(rows)  # several beams or sequences of one prompt: the first
        self.samples += [
            replace(
                row,
                new_tokens=new[number * each] if each else None,
                prefill_seconds=prefill,
                seconds=seconds / len(rows),
            )
            for number, row in enumerate(rows)
        ]
        return out

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        inputs = dict(kwargs)
        if args:
            first = next(iter(inspect.signature(self._generate).parameters))
            inputs.setdefault(first, args[0])
        if inputs.get("input_ids") is None and isinstance(inputs.get("inputs"), torch.Tensor):
            inputs["input_ids"] = inputs["inputs"]
        return inputs

    def _rows(self, inputs: Mapping[str, Any], prefills: int) -> list[Sample]:
        """Numbers of every row; empty where nothing is known of the rows."""
        ids = inputs.get("input_ids")
        if self.trace is not None and self.trace.prefills > prefills:
            assert self.trace.last is not None
            return _traced(self.trace.last)
        names = (self.bound.family.pixels, self.bound.family.video_pixels, *_IMAGES)
        with_images = any(inputs.get(name) is not None for name in names)
        if self.trace is not None and with_images:
            return [Sample(error=NOTHING)] * (1 if ids is None else len(ids))
        if ids is None:
            return []
        try:
            images = images_of_rows(self.bound, inputs)
            unpruned = unpruned_numbers(self.bound, inputs)
        except Exception as error:  # the answer stands; only its cost is not known
            from loguru import logger

            logger.warning(f"tokprune: no numbers for a prompt: {described(error)}")
            return [Sample()] * len(ids)
        rows = [
            _sample(len(shown), numbers, numbers)
            for shown, numbers in zip(images, unpruned, strict=True)
        ]
        if self.resized and not _one_size(self.bound.facts):
            unknown: dict[str, Any] = dict.fromkeys(
                ("tokens_in", "macs_unpruned", "kv_bytes_unpruned", "prompt_tokens")
            )
            rows = [replace(row, **unknown) for row in rows]
        return rows

    def _ends(self, kwargs: Mapping[str, Any]) -> set[int]:
        default = self.bound.model.generation_config.eos_token_id
        return end_tokens(kwargs.get("eos_token_id", default))


def _one_size(facts: ModelFacts) -> bool:
    """Whether an image has as many tokens whatever its size."""
    if facts.tower is not None:
        return facts.tower.max_tiles == 1
    tower = facts.observed
    return tower is not None and tower.patches // tower.merges**2 == facts.max_visual_tokens


def _traced(prefill: PrefillTrace) -> list[Sample]:
    counts = [len(prefill.visuals(b)) for b in range(len(prefill.original_lengths))]
    return [
        _sample(*row)
        for row in zip(counts, traced_numbers(prefill), unpruned_of(prefill), strict=True)
    ]


def _sample(images: int, pruned: Numbers, unpruned: Numbers) -> Sample:
    return Sample(
        images=images,
        tokens_in=int(unpruned.tokens_last),
        tokens_last=pruned.tokens_last,
        tokens_mean=pruned.tokens_mean,
        macs=pruned.macs,
        macs_unpruned=unpruned.macs,
        kv_bytes=pruned.kv_bytes,
        kv_bytes_unpruned=unpruned.kv_bytes,
        prompt_tokens=unpruned.prompt_tokens,
    )


def _new_tokens(out: Any, inputs: Mapping[str, Any], ends: set[int]) -> Sequence[int]:
    """Generated tokens of every sequence, the end token included."""
    tokens = getattr(out, "sequences", out)
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
        return []
    prompt = inputs.get("input_ids")
    if prompt is not None and tokens.shape[1] >= prompt.shape[1]:
        repeated = prompt.repeat_interleave(max(len(tokens) // len(prompt), 1), 0)
        start = tokens[:, : prompt.shape[1]]
        if torch.equal(start, repeated.to(start.device)):  # else only the new ones were returned
            tokens = tokens[:, prompt.shape[1] :]
    return [len(until_end(row, ends)) for row in tokens.tolist()]
