"""Logits and counts: against the unpruned model, in half precision, layer by layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.cache import cache_argument
from tokprune.families import bind
from tokprune.testing.case import GREEDY, Case, dropped, last_of
from tokprune.testing.generated import (
    forced_logits,
    generated_oracle,
    recorded_layers,
    turned_logits,
)
from tokprune.testing.hybrid import is_hybrid, layer_by_layer
from tokprune.testing.numbering import later_positions
from tokprune.testing.oracle import (
    assert_same_logits,
    continuation_tokens,
    mask_tower,
    merges,
    steps_are_known,
)
from tokprune.testing.report import Fault
from tokprune.trace import PrefillTrace


def _said(prefill: PrefillTrace) -> str:
    whole = sum(prefill.original_counts)
    return f"{whole - dropped(prefill)} of {whole} visual tokens in the last layer"


@dataclass
class Compared:
    """What a comparison found, the trace of its prefill, and both logits [B, 1 + steps, V] (None
    where there was nothing to compare with)."""

    said: str
    prefill: PrefillTrace
    got: Tensor | None = None
    want: Tensor | None = None


def equals_oracle(
    case: Case, steps: int = 3, turn: int = 0, *, oracle: Any = None,
    tolerance: float | None = None,
) -> Compared:  # fmt: skip
    """Prefill, a second turn and ``steps`` cached steps of ``generate()`` equal the unpruned model
    with the dropped keys hidden, or where tokens were merged, its decoder on the merged ones.

    Args:
        case: a model in float32.
        steps: cached steps, one token each.
        turn: tokens of a second turn, in one forward after the prompt.
        oracle: a model of the same weights to compare with (default: ``case.model``).
        tolerance: share of the largest logit (default: the family's).

    Raises:
        Fault: names the largest difference of the logits, or layer and image of a wrong count.
    """
    oracle = case.model if oracle is None else oracle
    inputs = case.inputs()
    continuation = continuation_tokens(len(case.prompts), turn + steps)
    with case.compress() as trace, recorded_layers(case.model) as seen:
        if turn:
            got = turned_logits(case.model, inputs, continuation, turn)
        else:
            got = forced_logits(case.model, inputs, continuation)
    prefill = last_of(trace)
    counts_are_true(prefill)
    length = inputs["input_ids"].shape[1]
    if any(int(layer.slot.max()) >= length for layer in prefill.layers):
        return Compared(
            f"{_said(prefill)}; not compared: an image has more tokens than the prompt has places "
            "for it, so the unpruned model has no such prompt", prefill,
        )  # fmt: skip
    merged = merges(prefill)
    handles = mask_tower(oracle, prefill)
    try:
        reference = layer_by_layer if is_hybrid(oracle) else generated_oracle
        entering, rectify = seen if merged else None, case.method.rectify
        want = reference(oracle, inputs, prefill, continuation, entering, rectify)
    finally:
        for handle in handles:
            handle.remove()
    if turn:
        want = torch.cat([want[:, :1], want[:, turn:]], dim=1)
    against = "its decoder on what was merged" if merged else "the dropped keys hidden"
    if merged and not steps_are_known(prefill):
        got, want, against = got[:, :1], want[:, :1], f"{against} (steps not compared)"
    hint = "" if merged else "; a stage that merges should say so (Selection.group)"
    what = f"against the unpruned model with {against}, the logits"
    tolerance = case.family.tolerance if tolerance is None else tolerance
    assert_same_logits(got, want, what, hint, tolerance)
    said = f"{_said(prefill)}; equal to the unpruned model with {against}"
    return Compared(said, prefill, got, want)


def keeps_everything(case: Case) -> str:
    """With a method that keeps everything no bit of the prefill and of a cached step changes."""
    inputs, model = case.inputs(), case.model
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": continuation_tokens(len(case.prompts), 1), "attention_mask": mask}
    with torch.no_grad():
        want = model(**inputs, use_cache=True)
        if bind(model).facts.axes > 1:  # the others number their tokens as they like
            step |= later_positions(model, mask, 1)
        with case.compress() as trace:
            got = model(**inputs, use_cache=True)
            after = model(**step, **{cache_argument(model): got.past_key_values}).logits
        plain = model(**step, **{cache_argument(model): want.past_key_values}).logits
    prefill = last_of(trace)
    if lost := dropped(prefill):
        raise Fault(f"{case.method!r} drops {lost} visual tokens")
    if prefill.layers[-1].lengths != prefill.original_lengths:
        raise Fault(
            f"the last layer saw {prefill.layers[-1].lengths} tokens instead of "
            f"{prefill.original_lengths}, though all visual tokens are kept"
        )
    for what, a, b in (("prompt", got.logits, want.logits), ("first step", after, plain)):
        if not torch.equal(a, b):
            raise Fault(
                f"nothing is dropped, yet the logits of the {what} are not those of the unpatched "
                f"model to the bit (they differ by up to {(a - b).abs().max().item():.3g}); return "
                "None where everything is kept, and leave hidden states alone"
            )
    if "nothing" not in trace.summary().lower():
        raise Fault("nothing is dropped, and trace.summary() does not say so")
    return "logits of prompt and first step are those of the unpatched model to the bit"


def counts_are_true(prefill: PrefillTrace) -> None:
    """The counts of every layer are those of the tokens that it saw.

    Raises:
        Fault: names layer, batch row, image and both numbers.
    """
    for number, layer in enumerate(prefill.layers):
        for b, counts in enumerate(layer.counts):
            for s, count in enumerate(counts):
                there = int(((layer.segment[b] == s) & (layer.column[b] >= 0)).sum())
                if there != count:
                    raise Fault(
                        f"decoder layer {number}, batch row {b}, image {s}: the method's counts "
                        f"say {count} tokens, but {there} are there"
                    )


def hidden_states_fit(case: Case) -> str:
    """``output_hidden_states=True`` gives every layer's states at the length of its sequence."""
    inputs = case.inputs()
    out, prefill = case.prefill(inputs, output_hidden_states=True)
    widths = [layer.column.shape[1] for layer in prefill.layers]
    got = [state.shape[1] for state in out.hidden_states[1:]]
    if got != widths:
        raise Fault(f"hidden_states of the layers are {got} long, their sequences {widths}")
    return "output_hidden_states has each layer's length"


def runs_in(case: Case, dtype: torch.dtype = torch.bfloat16) -> tuple[str, PrefillTrace]:
    """Half precision gives finite logits of that dtype, and generate() runs; what was found, and
    the trace of the prefill."""
    model = copy.deepcopy(case.model).to(dtype)
    low = case.having(model=model)
    inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in low.inputs().items()}
    out, prefill = low.prefill(inputs)
    with low.compress(), torch.no_grad():
        model.generate(**inputs, **GREEDY)
    if out.logits.dtype != dtype:
        raise Fault(f"logits are {out.logits.dtype} on a {dtype} model")
    if not torch.isfinite(out.logits[:, -1]).all():
        raise Fault(f"logits hold NaN or infinite values in {dtype}")
    return f"{_said(prefill)} in {str(dtype).removeprefix('torch.')}, finite", prefill
