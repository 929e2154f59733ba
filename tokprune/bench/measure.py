"""Where the time of an answer goes: encoder, selection, prefill, decoding, total.

Every part is measured in a pass of its own, variants in turns: a round times the encoder of every
variant, then the prefill and decoding of every variant, and so on, in alternating order. So the
measurements that are compared lie next to each other, and drift of the machine hits all alike.

- ``encoder``: ``get_image_features`` or ``get_video_features``, that is vision tower, projector,
  and what a method does in there (selection inside the encoder included);
- ``selection``: time inside the method's own code (scores, choices, merges), from timers around
  every call of its stages in a separate, instrumented prefill. It is a share of ``encoder`` and
  ``prefill``, not on top of them; gathers, masks and book-keeping of the engine are not in it.
  Absent for variants without a method;
- ``prefill``: the whole forward with its images until the first token is chosen;
- ``decode_per_token``: greedy steps after that prefill on its cache, divided by their number;
- ``total``: ``generate`` of exactly ``max_new_tokens`` tokens.

Accelerators are synchronised at both ends of a measurement and never inside (``selection`` apart).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokprune.api import compress, is_patched
from tokprune.bench.clock import CLOCKS, no_garbage_collection, synchronise, turns
from tokprune.bench.instrumented import Instrumented, Stopwatch
from tokprune.engine.cache import cache_argument
from tokprune.engine.shared_encoder import ENCODERS
from tokprune.families import bind
from tokprune.methods.base import Method

#: seconds by part, see above
PARTS = ("encoder", "selection", "prefill", "decode_per_token", "total")
#: the share of ``selection`` that lies inside ``encoder``; measured where it is asked for by name
SELECTION_IN_ENCODER = "selection_in_encoder"


@dataclass(frozen=True)
class Variant:
    """Something to time."""

    #: puts the model into its state and takes it back out
    context: Callable[[], AbstractContextManager[Any]]
    #: whose code ``selection`` times; None: nothing to time
    method: Method | None = None
    #: a batch of its own, for controls that change the images; None: the batch of all variants
    inputs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, model: Any, method: Method | None) -> Variant:
        """The model with a method at work, or as it is."""
        if method is None:
            return cls(nullcontext)
        return cls(lambda: compress(model, method), method)


def measure_trials(
    model: Any,
    inputs: Mapping[str, Any],
    variants: Mapping[str, Method | None],
    rounds: int,
    max_new_tokens: int,
    *,
    clock: str = "wall",
    progress: Callable[[int, int], None] | None = None,
    own_inputs: Mapping[str, Mapping[str, Any]] | None = None,
    enough: Callable[[], bool] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every part of every variant, one entry a round; see the module for the parts.

    Args:
        model: a supported model, not patched.
        inputs: what its processor made of one batch: ``input_ids`` [B, L], ``pixel_values``, …
        variants: methods by trial id; None is the unpruned model.
        rounds: measurements of each part; one more round warms up and is thrown away.
        max_new_tokens: tokens that ``generate`` makes, the first of them at the end of the
            prefill; with 1 there is nothing to decode and ``decode_per_token`` is absent.
        clock: "wall", or "cpu" for the time this process spent.
        progress: called with (rounds done, rounds), the warm-up being round 0.
        own_inputs: batches of the same questions for variants that see other images, by trial id.
        enough: asked after every round; true ends the measurements. Where it is true right after
            the warm-up, that round counts as the only one.

    Returns:
        ``{trial id: {part: [seconds, …]}}``. The model is unpatched, also after an exception.

    Raises:
        ValueError, TypeError: see the arguments.
        Exception: whatever a method raises on this model.
    """
    if not variants:
        raise ValueError("variants is empty; it should name a method, or None for unpruned")
    for name, method in variants.items():
        if method is not None and not isinstance(method, Method):
            raise TypeError(f"variants[{name!r}]={method!r} should be a method object or None")
    others = own_inputs or {}
    if strangers := sorted(set(others) - set(variants)):
        raise ValueError(f"own_inputs names {strangers}, which are not among the variants")
    timed = {
        name: replace(Variant.of(model, method), inputs=others.get(name))
        for name, method in variants.items()
    }
    return measure(
        model, inputs, timed, rounds, max_new_tokens, clock=clock, progress=progress, enough=enough
    )


def measure(
    model: Any,
    inputs: Mapping[str, Any],
    variants: Mapping[str, Variant],
    rounds: int,
    max_new_tokens: int,
    *,
    parts: tuple[str, ...] = PARTS,
    warmup: int = 1,
    clock: str = "wall",
    progress: Callable[[int, int], None] | None = None,
    enough: Callable[[], bool] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """As :func:`measure_trials`, for variants of any kind and a choice of ``parts``, which may name
    :data:`SELECTION_IN_ENCODER` as well. Nothing is decoded for parts that do not need it."""
    others = (variant.inputs for variant in variants.values())
    for batch in (inputs, *(batch for batch in others if batch is not None)):
        _check(model, batch, rounds, max_new_tokens, clock)
    steps = max_new_tokens - 1 if "decode_per_token" in parts else 0
    bench = _Passes(model, on_device(inputs, model.device), max_new_tokens, steps, clock)
    passes: list[Callable[[Variant], dict[str, float]]] = [
        work
        for wanted, work in (
            ({"encoder"}, bench.encoder),
            ({"prefill", "decode_per_token"}, bench.prefill_and_decode),
            ({"total"}, bench.total),
            ({"selection", SELECTION_IN_ENCODER}, bench.selection),
        )
        if wanted & set(parts)
    ]
    names = list(variants)
    times: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    with torch.inference_mode():
        for number in range(-warmup, rounds):
            if number == 0:  # what was measured to warm up goes
                times = {name: {} for name in names}
            with no_garbage_collection():
                for work in passes:
                    for name in turns(names, number):
                        for part, seconds in work(variants[name]).items():
                            if part in parts:
                                times[name].setdefault(part, []).append(seconds)
            over = enough is not None and enough()
            if progress is not None:
                progress(rounds if over else max(number + 1, 0), rounds)
            if over:
                break
    known = (*PARTS, SELECTION_IN_ENCODER)
    return {n: {p: seconds[p] for p in known if p in seconds} for n, seconds in times.items()}


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The tensors of a processor's output on a device."""
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in inputs.items()}


def new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=bind(model).model.config.get_text_config())


def _check(
    model: Any, inputs: Mapping[str, Any], rounds: int, max_new_tokens: int, clock: str
) -> None:
    bound = bind(model)
    family, multimodal = bound.family, bound.parts.multimodal
    if is_patched(model):
        raise ValueError("the model is patched; call tokprune.unpatch(model) before measuring it")
    if any(name in multimodal.__dict__ for name in ENCODERS):
        raise ValueError(
            "the model's get_image_features is replaced (by a SharedEncoder?); close that before "
            "measuring, or the encoder would not run"
        )
    for name, value in (("rounds", rounds), ("max_new_tokens", max_new_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} should be a whole number, at least 1")
    if clock not in CLOCKS:
        raise ValueError(f"clock={clock!r} should be one of {', '.join(map(repr, CLOCKS))}")
    for names in (("input_ids",), (family.pixels, family.video_pixels)):
        if all(inputs.get(name) is None for name in names):
            raise ValueError(
                f"inputs has no {' or '.join(map(repr, names))}; it should be the processor's "
                "output for a batch of prompts with images or videos"
            )


class _Passes:
    """The measurements, each of one variant: a dictionary of seconds by part."""

    def __init__(
        self, model: Any, inputs: dict[str, Any], tokens: int, steps: int, clock: str
    ) -> None:
        self.model, self.shared, self.tokens, self.clock = model, inputs, tokens, clock
        self.steps = steps
        bound = bind(model)
        self.device = bound.model.device
        self.family, self.facts, self.multimodal = bound.family, bound.facts, bound.parts.multimodal
        self.cache_name = cache_argument(bound.model)

    def _inputs(self, variant: Variant) -> dict[str, Any]:
        return self.shared if variant.inputs is None else on_device(variant.inputs, self.device)

    def _now(self) -> float:
        synchronise(self.device)
        return CLOCKS[self.clock]()

    def encoder(self, variant: Variant) -> dict[str, float]:
        inputs = self._inputs(variant)
        with variant.context():
            start = self._now()
            for name, pixels in zip(ENCODERS, (self.family.pixels, self.family.video_pixels)):
                if inputs.get(pixels) is None:
                    continue
                encode = getattr(self.multimodal, name)
                # settings of the config are not the defaults of LLaVA-OneVision in 4.57
                config = vars(self.multimodal.config).items()
                known = {**{n: v for n, v in config if n.startswith("vision_feature")}, **inputs}
                names = list(inspect.signature(encode).parameters)
                known[names[0]] = inputs[pixels]  # of videos, too, called pixel_values in 4.57
                encode(**{name: known[name] for name in names if name in known})
            return {"encoder": self._now() - start}

    def _prefill(self, inputs: Mapping[str, Any], cache: Any) -> Tensor:
        """Ids [B, 1] of the first new tokens."""
        options = {self.cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        logits: Tensor = self.model(**inputs, **options).logits
        return logits[:, -1:].argmax(-1)

    def prefill_and_decode(self, variant: Variant) -> dict[str, float]:
        inputs = self._inputs(variant)
        mask = inputs.get("attention_mask")
        with variant.context():
            start = self._now()
            cache = new_cache(self.model)
            token = self._prefill(inputs, cache)
            middle = self._now()
            for _ in range(self.steps):
                options = {self.cache_name: cache, "use_cache": True}
                if mask is not None:
                    mask = options["attention_mask"] = torch.cat(
                        [mask, mask.new_ones(len(mask), 1)], dim=1
                    )
                    if self.facts.axes > 1:  # transformers 5 would count all tokens of the mask
                        place = mask.sum(1, keepdim=True) - 1 + self.multimodal.rope_deltas
                        options["position_ids"] = place.expand(self.facts.axes, -1, -1)
                token = self.model(input_ids=token, **options).logits[:, -1:].argmax(-1)
            end = self._now()
        result = {"prefill": middle - start}
        if self.steps:
            result["decode_per_token"] = (end - middle) / self.steps
        return result

    def total(self, variant: Variant) -> dict[str, float]:
        inputs = self._inputs(variant)
        with variant.context():
            start = self._now()
            tokens = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                min_new_tokens=self.tokens,  # or an end-of-sequence token would end it early
                max_new_tokens=self.tokens,
                pad_token_id=0,
            )
            seconds = self._now() - start
        new = tokens.shape[1] - inputs["input_ids"].shape[1]
        if new != self.tokens:
            raise RuntimeError(f"generate made {new} tokens instead of {self.tokens}")
        return {"total": seconds}

    def selection(self, variant: Variant) -> dict[str, float]:
        if variant.method is None:
            return {}
        stopwatch, inputs = Stopwatch(self.device, self.clock), self._inputs(variant)
        with compress(self.model, Instrumented(variant.method, stopwatch)):
            self._prefill(inputs, new_cache(self.model))
        inside = stopwatch.by_part.get("encoder", 0.0)
        return {"selection": stopwatch.seconds, SELECTION_IN_ENCODER: inside}
