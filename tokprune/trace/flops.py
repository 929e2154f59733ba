"""Multiply-accumulates (MACs) of a prefill, counted from module widths and the trace.

Everything here is called ``macs``; one MAC is two floating-point operations, so FLOPs = 2 × MACs.
The papers' "FLOPs" are MACs by this count, see :func:`paper_flops`.

Counted: every matrix product of the model, at the token counts that each layer really had, with
the causal half of the decoder's score matrix counted in full (the convention of the papers), what
lies outside of a sliding window included. Of experts, those that a token meets. A convolution that
pools frames before the projector counts with it. Not counted: other pooling and interpolation,
norms, activations, softmax, embedding look-ups, padding rows, the triangular systems of linear
attention (:class:`~tokprune.engine.widths.Recurrence`), and what a method spends on its scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokprune.engine.model import ImageLayout
from tokprune.engine.widths import ModelShape

if TYPE_CHECKING:
    from tokprune.engine.contracts import ModelFacts
    from tokprune.engine.images import ImageRecord
    from tokprune.trace import PrefillTrace


@dataclass(frozen=True)
class Macs:
    """MACs of one prefill (whole batch), by place; ``decode_step`` is one step after it, for the
    whole batch, and is not in ``total``; where windows slide, it counts all cached tokens, too.
    ``lm_head`` is for one token per prompt, as in ``generate``."""

    patch_embedding: int
    encoder: tuple[int, ...]
    pooling: int
    projector: int
    decoder: tuple[int, ...]
    lm_head: int
    decode_step: int

    @property
    def total(self) -> int:
        return (
            self.patch_embedding + sum(self.encoder) + self.pooling + self.projector
            + sum(self.decoder) + self.lm_head
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return {
            "patch_embedding": self.patch_embedding,
            "encoder": list(self.encoder),
            "pooling": self.pooling,
            "projector": self.projector,
            "decoder": list(self.decoder),
            "lm_head": self.lm_head,
            "total": self.total,
            "decode_step": self.decode_step,
        }


def _decode_step(shape: ModelShape, entries: Sequence[Sequence[int]]) -> int:
    """``entries[l][b]``: cached before the step; the new token attends to them and itself."""
    rows = len(entries[0]) if entries else 0
    return rows * shape.lm_head + sum(
        layer.macs(1, n + 1) for layer, row in zip(shape.decoder, entries) for n in row
    )


def prefill_macs(prefill: PrefillTrace) -> Macs:
    """MACs of a recorded prefill, as it ran (reads the trace's tensors)."""
    rows = range(len(prefill.original_lengths))
    return _measured(prefill, prefill.records, rows, _cached(prefill))


def row_macs(prefill: PrefillTrace) -> list[Macs]:
    """MACs of a recorded prefill, prompt by prompt: each batch row with its own images and its
    own token counts, as if it had run alone. Padding of the batch is nobody's."""
    cached = _cached(prefill)
    return [
        _measured(prefill, prefill.records_of(row), [row], cached)
        for row in range(len(prefill.original_lengths))
    ]


def unpruned_macs(prefill: PrefillTrace) -> Macs:
    """MACs of the same prefill without any compression."""
    layouts = [record.layout for record in prefill.records]
    past = prefill.past_lengths()
    return model_macs(prefill.shape, prefill.facts, layouts, prefill.original_lengths, past)


def model_macs(
    shape: ModelShape,
    facts: ModelFacts,
    layouts: Sequence[ImageLayout],
    lengths: Sequence[int],
    past: Sequence[int] | None = None,
) -> Macs:
    """MACs of one prefill of an unpruned model, from its widths alone.

    Args:
        shape: widths of the model.
        facts: its tower and tiles.
        layouts: of all images and videos.
        lengths: real tokens of each prompt, visual ones included.
        past: cached tokens of each prompt (None: none).
    """
    past = [0] * len(lengths) if past is None else past
    head = _language(shape, lengths, past)
    tower = facts.tower
    if tower is None:
        rows_of = [[attended(shape, x, number) for number in range(len(shape.encoder))]
                   for x in layouts]  # fmt: skip
        cells = [len(x.packed) for x in layouts]
        return Macs(*_whole_encoder(shape, layouts, rows_of, cells), *head)
    rows = tower.patches + int(tower.has_cls)
    tiles = sum(layout.tiles for layout in layouts)
    # frames that the model pools before the projector
    pooled = sum(x.tiles * x.projected for x in layouts if x.projected is not None)
    whole = sum(x.tiles for x in layouts if x.projected is None) * tower.tokens_per_tile
    return Macs(
        patch_embedding=tiles * tower.patches * shape.patch_embedding,
        encoder=tuple(tiles * layer.macs(rows) for layer in shape.encoder),
        pooling=0 if shape.pooling is None else tiles * shape.pooling.macs(rows),
        projector=(whole + pooled) * shape.projector + pooled * shape.resampler,
        decoder=head[0],
        lm_head=head[1],
        decode_step=head[2],
    )


def _language(
    shape: ModelShape, lengths: Sequence[int], past: Sequence[int]
) -> tuple[tuple[int, ...], int, int]:
    """MACs of the decoder's layers, of the head and of a step after it, unpruned."""
    decoder = tuple(
        sum(layer.macs(n, n + p) for n, p in zip(lengths, past)) for layer in shape.decoder
    )
    cached = [[n + p for n, p in zip(lengths, past)]] * len(shape.decoder)
    return decoder, len(lengths) * shape.lm_head, _decode_step(shape, cached)


def attended(shape: ModelShape, layout: ImageLayout, layer: int) -> tuple[int, ...]:
    """Rows of an image that attend to each other in a layer of an encoder taken as a whole."""
    segments = layout.segments
    if segments is None:
        return ()
    return segments.windows if layer in shape.windowed else segments.full


def encoder_rows(shape: ModelShape, record: ImageRecord) -> list[tuple[list[int], list[int]]]:
    """Per layer of an encoder taken as a whole: rows of an image in its attention, rows of each of
    its frames in its MLP, as they ran."""
    layout, cuts = record.layout, dict(record.history)
    full = [] if layout.segments is None else list(layout.segments.full)
    found, left = [], None
    for layer in range(len(shape.encoder)):
        found.append((list(attended(shape, layout, layer)) if left is None else left, left or full))
        if layer in cuts:
            left = (cuts[layer] >= 0).sum(1).tolist()
    return found


def _whole_encoder(
    shape: ModelShape,
    layouts: Sequence[ImageLayout],
    rows_of: Sequence[Sequence[Sequence[int]]],
    cells: Sequence[int],
) -> tuple[int, tuple[int, ...], int, int]:
    """MACs of an encoder taken as a whole: patch embedding, layers, pooling, projector.
    ``rows_of[image][layer]``: rows that attend to each other; ``cells``: what the projector makes.

    Rows that do not attend to each other are counted apart, although some models multiply all
    rows of a call and mask (Pixtral). Padding is left out (Gemma 4). Tokens of an image that stand
    at no place of a grid went through the projector as well (class tokens of Video-LLaVA).
    """
    encoder = tuple(
        sum(layer.macs(rows) for image in rows_of for rows in image[number])
        for number, layer in enumerate(shape.encoder)
    )
    patches = pooling = projector = 0
    for layout, own in zip(layouts, cells, strict=True):
        full = () if layout.segments is None else layout.segments.full
        patches += sum(full) - len(full) * shape.class_tokens
        if shape.pooling is not None:
            pooling += sum(shape.pooling.macs(rows) for rows in full)
        pooling += sum(full) * own * shape.averaged
        projector += own * shape.projector
    return patches * shape.patch_embedding, encoder, pooling, projector


def _cached(prefill: PrefillTrace) -> list[tuple[list[int], list[int]]]:
    """Per decoder layer and batch row: cached tokens before the prefill, and after it."""
    return [(prefill.past_entries(seen), prefill.kv_entries(seen)) for seen in prefill.layers]


def _measured(
    prefill: PrefillTrace,
    records: Sequence[ImageRecord],
    rows: Sequence[int],
    cached: list[tuple[list[int], list[int]]],
) -> Macs:
    """MACs of some images and some batch rows of a prefill."""
    shape, tower = prefill.shape, prefill.facts.tower
    decoder = []
    for layer, seen, (past, _) in zip(shape.decoder, prefill.layers, cached):
        decoder.append(sum(layer.macs(seen.lengths[b], seen.lengths[b] + past[b]) for b in rows))
    lm_head = len(rows) * shape.lm_head
    step = _decode_step(shape, [[held[b] for b in rows] for _, held in cached])
    if tower is None:
        rows_of = [[rows for rows, _ in encoder_rows(shape, record)] for record in records]
        cells = [len(r.layout.packed if r.cell is None else r.cell) for r in records]
        whole = _whole_encoder(shape, [record.layout for record in records], rows_of, cells)
        return Macs(*whole, tuple(decoder), lm_head, step)
    cut = int(tower.has_cls and not tower.cls_in_features)
    patches = pooling = projector = 0
    encoder = [0] * len(shape.encoder)
    for record in records:
        alive = prefill.tower_rows(record)
        patches += record.layout.tiles * tower.patches
        for number, (layer, (attended, mlp)) in enumerate(zip(shape.encoder, alive)):
            encoder[number] += sum(
                layer.macs(a, mlp_rows=m) for a, m in zip(attended, mlp, strict=True)
            )
        out = prefill.tower_output(record)
        if record.layout.projected is not None:
            rows_ = record.layout.tiles * record.layout.projected
            projector += rows_ * (shape.projector + shape.resampler)
        else:
            projector += shape.projector * sum(n - cut for n in out)
        if shape.pooling is not None:
            pooling += sum(shape.pooling.macs(n) for n in out)
    return Macs(
        patch_embedding=patches * shape.patch_embedding,
        encoder=tuple(encoder),
        pooling=pooling,
        projector=projector,
        decoder=tuple(decoder),
        lm_head=lm_head,
        decode_step=step,
    )


def paper_flops(tokens_per_layer: Sequence[float], d: int, m: int, gated: bool = False) -> float:
    """The papers' simplified count, Σ over layers of ``4nd² + 2n²d + 2ndm``.

    It assumes q, k, v and o of full width (no grouped-query attention), counts the decoder
    alone, and counts MACs, although the papers print the result as "FLOPs".

    Args:
        tokens_per_layer: n of each decoder layer (visual tokens, or all tokens: papers differ).
        d: hidden width.
        m: MLP width.
        gated: count the three matrices of a gated MLP, ``3ndm`` (TransPrune does, FastV does
            not).

    Example::

        >>> paper_flops([576] * 32, d=4096, m=11008, gated=True) / 1e12  # LLaVA-1.5-7B
        3.818...
    """
    mlp = 3 if gated else 2
    return sum(4 * n * d**2 + 2 * n**2 * d + mlp * n * d * m for n in tokens_per_layer)
