"""Ask every question of an image on the cache that every other question left."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor

from tokprune.api import compress
from tokprune.engine.cache import cache_argument
from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.sweep.answers import end_tokens, until_end
from tokprune.eval.sweep.evaluator import Batch
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.inputs.prompts import conversation_text, model_inputs
from tokprune.methods.base import Method
from tokprune.trace import Trace

History = Literal["none", "own"]

#: what a turn on a cache is given of the inputs
_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass(frozen=True)
class Answered:
    """A question on the cache that a first one left; the two are the same where it was asked alone.

    ``overlap``: of the tokens kept under the two questions, the share that is the same (in the last
    decoder layer; 1 without a method); ``error``: why there is no answer.
    """

    trial: str
    first: Item
    second: Item
    answer: str = ""
    score: float = 0.0
    overlap: float | None = None
    error: str | None = None


class Prompts:
    """All questions about one image, as inputs of the model.

    Raises:
        ValueError: the prompts part before the image ends, so that no cache can serve two.
    """

    def __init__(self, loaded: LoadedModel, benchmark: Benchmark, items: Sequence[Item]) -> None:
        self.loaded, self.benchmark, self.items = loaded, benchmark, items
        #: that were made: they are the same for all trials
        self._conversations: dict[tuple[int, int], dict[str, Any]] = {}
        singles = [Batch(loaded, benchmark, [item]) for item in items]
        self.visual = singles[0].visuals[0]
        self.inputs = [dict(single.inputs) for single in singles]
        family = loaded.family
        self.pixels = self.inputs[0][
            family.video_pixels if benchmark.media == "video" else family.pixels
        ]
        for own in self.inputs:  # one tensor, so that the encoder's output can be shared
            length = own["input_ids"].shape
            shared = [n for n, value in own.items() if value.shape[:2] != length]
            own.update({name: self.inputs[0][name] for name in shared})
        ids = [own["input_ids"][0].tolist() for own in self.inputs]
        #: columns of all prompts up to where they part
        self.prefix = sum(1 for _ in takewhile(lambda c: len(set(c)) == 1, zip(*ids)))
        visual = family.placeholders(loaded.parts, self.inputs[0])[0] > 0
        last = int(visual.nonzero().max())
        if len(items) > 1 and self.prefix <= last:
            raise ValueError(
                f"image {items[0].image_id!r}: its prompts part at token {self.prefix}, before the "
                f"image ends (token {last}); a second question needs the image to stand first"
            )

    def conversation(self, first: int, answer: str, second: int) -> dict[str, Any]:
        """Inputs of a first question, its answer (one for each first question, whoever asks), and a
        second one.

        Raises:
            ValueError: the model writes a conversation otherwise than its first prompt.
        """
        if (known := self._conversations.get((first, second))) is not None:
            return known
        video = self.benchmark.media == "video"
        shown = self.visual if isinstance(self.visual, list) and not video else [self.visual]
        suffix = self.benchmark.prompt_suffix
        text = conversation_text(
            self.loaded.processor,
            [self.items[first].question + suffix, answer, self.items[second].question + suffix],
            images=0 if video else len(shown), videos=int(video),
        )  # fmt: skip
        images, videos = ([], [shown]) if video else ([shown], [])
        made = model_inputs(
            self.loaded.processor, [text], images, videos, model=self.loaded.model
        ).to(self.loaded.device)
        own = self._conversations[first, second] = dict(made)
        length = self.inputs[first]["input_ids"].shape[1]
        if not torch.equal(own["input_ids"][:, :length], self.inputs[first]["input_ids"]):
            raise ValueError(
                "history='own': this model's form of a conversation does not begin with the prompt "
                "of its first question; use history='none'"
            )
        return own


def ask_image(
    prompts: Prompts, methods: Mapping[str, Method | None], history: History
) -> Iterator[Answered]:
    """Every ordered pair of an image's questions, and every question alone, by every trial.

    Args:
        prompts: of the image.
        methods: of every trial; "none", without one, comes first: its answers are the history.
        history: what a second question comes after: the image alone ("none"), or the image, the
            first question and the *unpruned* model's answer to it ("own").
    """
    told: dict[int, str] = {}
    for trial, method in methods.items():
        state = nullcontext() if method is None else compress(prompts.loaded.model, method)
        with state as trace:
            for answered in _ask(prompts, trial, trace, history, told):
                if trial == "none" and answered.first is answered.second:
                    told[prompts.items.index(answered.first)] = answered.answer
                yield answered


def _ask(
    prompts: Prompts, trial: str, trace: Trace | None, history: History, told: Mapping[int, str]
) -> Iterator[Answered]:
    found: dict[tuple[int, int], tuple[str, str | None]] = {}
    kept: list[frozenset[int]] = []
    numbers = range(len(prompts.items))
    caches = []
    for first in numbers:
        cache, begun = _prefill(prompts, prompts.inputs[first])
        kept.append(_kept(trace))
        caches.append(cache)
        found[first, first] = _answer(prompts, begun, copy.deepcopy(cache), begun=1)
        if trial == "none":  # the history of what follows
            yield _row(prompts, trial, first, first, found, None)
    for first in numbers:
        for second in numbers:
            if first == second:
                continue
            if history == "none" and trace is None:  # nothing is left of the first question
                found[first, second] = found[second, second]
                continue
            if history == "none":
                inputs, cache = prompts.inputs[second], _cut(prompts, caches[first], first)
            else:
                inputs = prompts.conversation(first, told[first], second)
                cache = copy.deepcopy(caches[first])
            found[first, second] = _answer(prompts, inputs, cache)
    for first, second in found:
        if trial == "none" and first == second:
            continue
        common = None
        if trace is not None:
            both = max(len(kept[first]), len(kept[second]), 1)
            common = len(kept[first] & kept[second]) / both
        yield _row(prompts, trial, first, second, found, common)


def _row(
    prompts: Prompts, trial: str, first: int, second: int,
    found: Mapping[tuple[int, int], tuple[str, str | None]], overlap: float | None,
) -> Answered:  # fmt: skip
    answer, error = found[first, second]
    item = prompts.items[second]
    score = 0.0 if error else float(prompts.benchmark.score(item, answer))
    return Answered(trial, prompts.items[first], item, answer, score, overlap, error)


def _prefill(prompts: Prompts, inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The cache of a prompt, and its text with the first token of the answer."""
    with torch.inference_mode():
        out = prompts.loaded.model.generate(
            **inputs, max_new_tokens=1, do_sample=False, num_beams=1, return_dict_in_generate=True,
            pad_token_id=prompts.loaded.processor.tokenizer.pad_token_id,
        )  # fmt: skip
    text = {name: inputs[name] for name in _TEXT if name in inputs}
    more = {name: torch.zeros_like(value[:, :1]) for name, value in text.items()}
    more["input_ids"] = out.sequences[:, -1:]
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    begun = {name: torch.cat([value, more[name]], dim=1) for name, value in text.items()}
    return out.past_key_values, begun


def _cut(prompts: Prompts, cache: Any, first: int) -> Any:
    """A copy of a cache without the question.

    Raises:
        ValueError: the model's layers have forgotten what stood before it.
    """
    own = copy.deepcopy(cache)
    try:
        own.crop(-(prompts.inputs[first]["input_ids"].shape[1] - prompts.prefix))
    except (RuntimeError, ValueError) as error:  # of a sliding window
        raise ValueError(
            "history='none': the cache of this model cannot be cut back to the image "
            f"({' '.join(str(error).split())[:160]}); use history='own'"
        ) from error
    return own


def _answer(
    prompts: Prompts, inputs: Mapping[str, Any], cache: Any, begun: int = 0
) -> tuple[str, str | None]:
    """(answer, error) of a prompt of which the cache has the beginning, and whose last tokens are
    those with which the answer has ``begun``."""
    model, tokenizer = prompts.loaded.model, prompts.loaded.processor.tokenizer
    text = {name: inputs[name] for name in _TEXT if name in inputs}
    ends = end_tokens(model.generation_config.eos_token_id)
    start = text["input_ids"].shape[1] - begun
    more = prompts.benchmark.max_new_tokens - begun
    out = text["input_ids"]
    if begun and (not more or int(out[0, -1]) in ends):
        return _text(tokenizer, out[0, start:].tolist(), ends), None
    try:
        with torch.inference_mode():
            out = model.generate(
                **text, **{cache_argument(model): cache}, do_sample=False, num_beams=1,
                max_new_tokens=more,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
    except Exception as error:
        return "", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return _text(tokenizer, out[0, start:].tolist(), ends), None


def _text(tokenizer: Any, tokens: list[int], ends: set[int]) -> str:
    return str(tokenizer.decode(until_end(tokens, ends), skip_special_tokens=True)).strip()


def _kept(trace: Trace | None) -> frozenset[int]:
    """Columns of visual tokens in the last decoder layer of the newest prefill."""
    if trace is None:
        return frozenset()
    if trace.last is None:
        raise RuntimeError("the method saw no image and no video: nothing was compressed")
    layer = trace.last.layers[-1]
    return frozenset(layer.column[0][layer.segment[0] >= 0].tolist())
