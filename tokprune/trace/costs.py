"""Tokens, MACs and cache bytes of every question, from the trace or from the model's shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokprune.engine.family import BoundModel
from tokprune.engine.model import ImageLayout, Tiles
from tokprune.engine.prompt_layout import read_islands
from tokprune.trace.flops import model_macs, row_macs
from tokprune.trace.record import PrefillTrace


@dataclass(frozen=True)
class Numbers:
    """One question: visual tokens in the last decoder layer and on average over the layers, MACs
    of the prefill, bytes of the KV cache after it, tokens of the prompt before compression."""

    tokens_last: float
    tokens_mean: float
    macs: int
    kv_bytes: int
    prompt_tokens: int


def images_of_rows(known: BoundModel, inputs: Mapping[str, Any]) -> list[list[ImageLayout]]:
    """The images of every row of a batch, then its videos.

    Args:
        inputs: ``input_ids`` [B, L], and what else the processor gives, in the order of the
            placeholders.
    """
    family, parts, facts = known.family, known.parts, known.facts
    rows: list[list[ImageLayout]] = [[] for _ in inputs["input_ids"]]
    if not any(inputs.get(name) is not None for name in (family.pixels, family.video_pixels)):
        return rows
    visual = family.placeholders(parts, inputs).cpu()
    waiting: list[tuple[int, Iterator[ImageLayout]]] = []
    if inputs.get(family.pixels) is not None:
        images = family.images(parts, facts, inputs)
        if isinstance(images, Tiles):
            prompt, tiles = read_islands(visual == 1, None, 0, images)
            return [[images.image(tiles[n]) for n in own] for own in prompt.image_of]
        waiting.append((1, iter(images)))
    if inputs.get(family.video_pixels) is not None:
        waiting.append((2, iter(family.videos(parts, facts, inputs))))
    for kind, layouts in waiting:
        for own, tokens in zip(rows, (visual == kind).sum(1).tolist()):
            while tokens > 0 and (layout := next(layouts, None)) is not None:
                own.append(layout)
                tokens -= len(layout.packed)
    return rows


def unpruned_numbers(known: BoundModel, inputs: Mapping[str, Any]) -> list[Numbers]:
    """The model as it is, for every row of a batch (see :func:`images_of_rows`). Nothing runs."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    visual = (known.family.placeholders(known.parts, inputs) > 0).sum(1).tolist()
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    size = known.model.dtype.itemsize
    return [
        Numbers(
            tokens_last=float(tokens),
            tokens_mean=float(tokens),
            macs=model_macs(known.shape, known.facts, own, [length]).total,
            kv_bytes=length * known.shape.kv_numbers * size,
            prompt_tokens=length,
        )
        for tokens, length, own in zip(visual, lengths, images_of_rows(known, inputs))
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


def unpruned_of(prefill: PrefillTrace) -> list[Numbers]:
    """The same prefill as it would be without compression, for every row."""
    size = prefill.kv_itemsize
    rows = []
    for b, length in enumerate(prefill.original_lengths):
        layouts = [record.layout for record in prefill.records_of(b)]
        tokens = float(prefill.original_counts[b])
        rows.append(
            Numbers(
                tokens_last=tokens,
                tokens_mean=tokens,
                macs=model_macs(prefill.shape, prefill.facts, layouts, [length]).total,
                kv_bytes=length * prefill.shape.kv_numbers * size,
                prompt_tokens=length,
            )
        )
    return rows
