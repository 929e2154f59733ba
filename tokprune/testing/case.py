"""A method on a tiny model with the prompts of a batch: what every check works on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from tokprune.api import compress
from tokprune.methods import Method
from tokprune.testing.numbering import prompt_positions
from tokprune.testing.report import Fault
from tokprune.testing.tiny import TinyFamily
from tokprune.trace import PrefillTrace, Trace

#: a prompt: text lengths, "image" and "video" entries (:func:`tokprune.testing.make_inputs`)
Prompts = list[list[Any]]

SINGLE: Prompts = [[4, "image", 6]]
#: the last row has neither the longest text nor the largest image
RAGGED: Prompts = [[4, "image", 6], [7, "image", 9], [2, "image", 3]]
SEVERAL: Prompts = [[4, "image", 2, "image", 6], [9], [3, "image", 5]]
VIDEOS: Prompts = [[4, "video", 3, "image", 6], [7, "image", 1, "video", 9], [2, "image", 3]]
#: (height, width) of the images of a batch, for families that tile: tall, wide, near square
SIZES = [(14, 40), (40, 14), (30, 22), (20, 40), (10, 72)]

#: options of a greedy generate()
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@dataclass(frozen=True)
class Case:
    """A method, a tiny model that is not patched, and a batch of prompts."""

    method: Method
    family: TinyFamily
    model: Any
    prompts: Prompts
    #: as ``make_inputs`` takes them; None: those of the family, or of :data:`SIZES`, in turn
    sizes: list[tuple[int, int]] | None = None

    def having(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def inputs(self, seed: int = 1, pad_side: str = "left") -> dict[str, Tensor]:
        sizes = self.sizes or list(islice(cycle(self.family.sizes or SIZES), self._count("image")))
        return self.family.inputs(
            self.model, self.prompts, sizes or None, seed=seed, pad_side=pad_side
        )

    def row(self, inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
        """A row of ``inputs`` as a batch of one."""
        slices = []
        for kind in ("image", "video"):
            start = sum(prompt.count(kind) for prompt in self.prompts[:row])
            slices.append(slice(start, start + self.prompts[row].count(kind)))
        return self.family.row(inputs, row, *slices)

    def _count(self, kind: str) -> int:
        return sum(prompt.count(kind) for prompt in self.prompts)

    def compress(self) -> AbstractContextManager[Trace]:
        """The method at work on the model, its answers validated."""
        return compress(self.model, self.method, validate=True)

    @torch.no_grad()
    def prefill(self, inputs: dict[str, Tensor], **options: Any) -> tuple[Any, PrefillTrace]:
        """Output and trace of one forward of the compressed model on a prompt."""
        with self.compress() as trace:
            out = self.model(**inputs, **prompt_positions(self.model, inputs), **options)
        return out, last_of(trace)


def last_of(trace: Trace) -> PrefillTrace:
    if trace.last is None:
        raise Fault(
            "the trace holds no prefill, though the prompt has images: the method's hooks did not "
            "see the forward"
        )
    return trace.last


def dropped(prefill: PrefillTrace) -> int:
    """Visual tokens of the batch that the last decoder layer did not see."""
    return sum(prefill.original_counts) - sum(map(sum, prefill.layers[-1].counts))
