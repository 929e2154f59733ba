"""Tokens, MACs and cache bytes of every question, from the trace or from the model's shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokprune.flops import model_macs, row_macs
from tokprune.sweep.subject import Subject
from tokprune.trace import PrefillTrace


@dataclass(frozen=True)
class Numbers:
    """One question: visual tokens in the last decoder layer and on average over the layers, MACs
    of the prefill, bytes of the KV cache after it, tokens of the prompt before compression."""

    tokens_last: float
    tokens_mean: float
    macs: int
    kv_bytes: int
    prompt_tokens: int


def unpruned_numbers(subject: Subject, inputs: Any) -> list[Numbers]:
    """The model as it is, for every row of a batch with one picture each. Nothing runs."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    visual = (ids == subject.parts.image_token_id).sum(1).tolist()
    lengths = mask.sum(1).tolist()
    layouts = subject.family.layouts(
        subject.parts, inputs["pixel_values"], inputs.get("image_sizes"), subject.facts
    )
    size = subject.model.dtype.itemsize
    return [
        Numbers(
            tokens_last=float(tokens),
            tokens_mean=float(tokens),
            macs=model_macs(subject.shape, subject.facts, layout.tiles, [length]).total,
            kv_bytes=length * subject.shape.kv_numbers * size,
            prompt_tokens=length,
        )
        for tokens, length, layout in zip(visual, lengths, layouts, strict=True)
    ]


def traced_numbers(prefill: PrefillTrace) -> list[Numbers]:
    """What a method left, for every row of a recorded prefill."""
    layers = [[sum(own) for own in layer.counts] for layer in prefill.layers]
    entries = [prefill.kv_entries(layer) for layer in prefill.layers]
    widths = [layer.kv * prefill.kv_itemsize for layer in prefill.shape.decoder]
    return [
        Numbers(
            tokens_last=float(layers[-1][b]),
            tokens_mean=sum(row[b] for row in layers) / len(layers),
            macs=macs.total,
            kv_bytes=sum(held[b] * width for held, width in zip(entries, widths)),
            prompt_tokens=prefill.original_lengths[b],
        )
        for b, macs in enumerate(row_macs(prefill))
    ]
