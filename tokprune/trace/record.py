"""What compression did: tokens per layer, and which original tokens they were.

The engine records tensors as they are, without reading them back; everything that needs the
host happens when a trace is asked.

With ``output_hidden_states=True`` a compressed model returns hidden states of different lengths
per layer; ``trace.kept(layer)`` and the layers of ``to_dict()`` tell which tokens they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from tokprune.engine.contracts import ADDED, ImageTokens, Selection
from tokprune.engine.model import ModelFacts
from tokprune.engine.widths import ModelShape

if TYPE_CHECKING:
    from tokprune.engine.drops import Drop
    from tokprune.engine.images import ImageRecord
    from tokprune.engine.recorder import PrefillRecord
    from tokprune.trace.provenance import Token


@dataclass
class LayerTrace:
    """Sequence of one decoder layer in a prefill (tensors [B, L], on the model's device).

    ``column``: original prompt column of each entry, −1 = padding; ``slot``: the one that masks see
    it at (:class:`~tokprune.engine.contracts.SequenceView`); ``position``: its rotary position,
    [3, B, L] under M-RoPE; ``segment``: image number inside the batch row, −1 for text;
    ``counts[b][s]``: visual tokens per image; ``lengths[b]``: all real tokens; ``cached[b]``: KV
    entries of this prefill that the layer holds after it (fewer than ``lengths`` where a method
    prunes the cache, 0 without a cache). ``entries`` [B, n]: conversation column of everything
    that a compressed layer holds after the prefill, earlier turns included, −1 = padding; None for
    an ordinary cache layer or without a cache. ``next_position`` [B]: rotary position that the next
    token gets in this layer. ``size``: tokens that each stands for, where attention is rectified
    (:class:`~tokprune.engine.contracts.Rectify`); None: 1 each.
    """

    column: Tensor
    slot: Tensor
    position: Tensor
    segment: Tensor
    counts: list[list[int]]
    lengths: list[int]
    cached: list[int]
    entries: Tensor | None = None
    next_position: Tensor | None = None
    size: Tensor | None = None


@dataclass
class ImageTrace:
    """One image, video or part of a video of a prefill: where it stands, how it was packed, what
    entered the decoder.

    The feature tensors of ``record``, ``entered`` and ``selection`` are left out, so that a
    trace holds numbers only.
    """

    row: int
    number: int
    columns: Tensor
    record: ImageRecord | None
    entered: ImageTokens | None
    selection: Selection | None


@dataclass
class PrefillTrace:
    """One prefill with images, as the engine left it.

    ``drops``: what was dropped or merged inside the decoder, in order;
    ``between_layers``: encoder layers that reduce between attention and MLP; ``past``: tokens of
    earlier turns, in the original count; ``past_mask`` [B, past]: which of them are no padding
    (None: all); ``kv_itemsize``: bytes of one cached number, 0 without a cache.
    """

    facts: ModelFacts
    images: list[ImageTrace]
    layers: list[LayerTrace]
    drops: list[Drop]
    original_lengths: list[int]
    past: int
    shape: ModelShape
    between_layers: frozenset[int] = frozenset()
    past_mask: Tensor | None = None
    kv_itemsize: int = 0
    decode_steps: int = 0

    @property
    def records(self) -> list[ImageRecord]:
        """The encoded images, each once."""
        return list(dict.fromkeys(i.record for i in self.images if i.record is not None))

    def records_of(self, row: int) -> list[ImageRecord]:
        """The encoded images of a prompt, each once."""
        own = (image.record for image in self.images if image.row == row)
        return list(dict.fromkeys(record for record in own if record is not None))

    def visuals(self, row: int) -> list[list[ImageTrace]]:
        """Images and videos of a prompt, in order; a video may be in several parts."""
        found: list[list[ImageTrace]] = []
        for image in self.images:
            if image.row == row:
                if image.record is not None and image.record.layout.first_frame:
                    found[-1].append(image)
                else:
                    found.append([image])
        return found

    @property
    def original_counts(self) -> list[int]:
        """Visual tokens of each prompt before compression."""
        counts = [0] * len(self.original_lengths)
        for image in self.images:
            counts[image.row] += len(image.columns)
        return counts

    def tower_rows(self, record: ImageRecord) -> list[tuple[list[int], list[int]]]:
        """Per encoder layer: rows of each tile in its attention and in its MLP, class token and
        added rows included. A reduction after a block counts from the next layer on."""
        tower = self.facts.tower
        if tower is None:
            return []
        own = tower.patches + int(tower.has_cls)
        now = [own + record.added] * record.layout.tiles
        after = _reductions(record, int(tower.has_cls))
        rows = []
        for layer in range(tower.encoder_layers):
            if layer - 1 == record.added_until:
                now = [own] * record.layout.tiles
            changes = after.get(layer, [])
            attended = mlp = now
            if changes and layer in self.between_layers:
                mlp = changes[0]
            rows.append((attended, mlp))
            now = changes[-1] if changes else now
        return rows

    def tower_output(self, record: ImageRecord) -> list[int]:
        """Rows of each tile at the end of the encoder, class token included."""
        tower = self.facts.tower
        assert tower is not None
        after = _reductions(record, int(tower.has_cls))
        if after:
            return after[max(after)][-1]
        return [tower.patches + int(tower.has_cls)] * record.layout.tiles

    def past_lengths(self) -> list[int]:
        """Tokens of earlier turns per batch row, padding left out, before any compression."""
        if self.past_mask is None:
            return [self.past] * len(self.original_lengths)
        return [int(n) for n in (self.past_mask != 0).sum(1).tolist()]

    def past_entries(self, layer: LayerTrace) -> list[int]:
        """Cached tokens of earlier turns that this layer attends to."""
        if not self.past:
            return [0] * len(layer.lengths)
        if layer.entries is None:
            return self.past_lengths()
        before = (layer.entries >= 0) & (layer.entries < self.past)
        return [int(n) for n in before.sum(1).tolist()]

    def kv_entries(self, layer: LayerTrace) -> list[int]:
        """KV entries per batch row that this layer holds, earlier turns included."""
        if not self.kv_itemsize:
            return [0] * len(layer.lengths)
        if layer.entries is not None:
            return [int(n) for n in (layer.entries >= 0).sum(1).tolist()]
        return [n + p for n, p in zip(layer.cached, self.past_lengths())]

    def kv_bytes(self) -> list[int]:
        """KV bytes per decoder layer (whole batch, padding left out)."""
        return [
            sum(self.kv_entries(seen)) * layer.kv * self.kv_itemsize
            for layer, seen in zip(self.shape.decoder, self.layers)
        ]

    def kv_bytes_unpruned(self) -> int:
        tokens = sum(self.original_lengths) + sum(self.past_lengths())
        return tokens * self.shape.kv_numbers * self.kv_itemsize


def _reductions(record: ImageRecord, cls: int) -> dict[int, list[list[int]]]:
    """Rows of each tile after every reduction, by layer; two where a layer reduces twice."""
    after: dict[int, list[list[int]]] = {}
    for layer, slots in record.history:
        counts = (((slots >= 0) | (slots == ADDED)).sum(1) + cls).tolist()
        after.setdefault(layer, []).append([int(n) for n in counts])
    return after


@dataclass
class Trace:
    """Record of the prefills that a patched model ran; the newest is kept in full.

    ``prefills`` counts them all, ``decode_steps`` the steps after the newest (without those that
    ``torch.compile`` runs as one graph).
    """

    #: called with every trace of this process that has just recorded a prefill
    observers: ClassVar[list[Callable[[Trace], None]]] = []

    method: str = ""
    last: PrefillTrace | None = None
    prefills: int = 0
    #: running sums over prefills and batch rows, for means: visual tokens per decoder layer
    _sums: list[int] = field(default_factory=list)
    _rows: int = 0

    @property
    def decode_steps(self) -> int:
        return self.last.decode_steps if self.last is not None else 0

    def record_step(self) -> None:
        if self.last is not None:
            self.last.decode_steps += 1

    def record_prefill(self, record: PrefillRecord) -> None:
        """Called by the engine at the end of a prefill."""
        prefill, layout, records = record.prefill, record.layout, record.records
        entered, answers = record.entered, record.selections
        stripped = None if records is None else [
            replace(r, features=None, raw=None, newline=None) for r in records
        ]  # fmt: skip
        traces = []
        flat = 0
        for b, row in enumerate(layout.image_of):
            for s, number in enumerate(row):
                traces.append(
                    ImageTrace(
                        row=b,
                        number=s,
                        columns=layout.columns[b][s],
                        record=stripped[number] if stripped is not None else None,
                        entered=entered[flat] if flat < len(entered) else None,
                        selection=answers[flat] if flat < len(answers) else None,
                    )
                )
                flat += 1
        cache = prefill.cache
        following = cache.native_next
        layers = [
            LayerTrace(
                cache.users(v.column), v.slot, prefill.positions[n], v.segment, v.counts, v.lengths,
                cache.lengths(n, v), cache.columns(n), cache.next_position(n, v, following), v.size,
            )
            for n, v in enumerate(prefill.sequences)
        ]  # fmt: skip
        mask, past = cache.attention_mask, cache.past
        self.last = PrefillTrace(
            facts=record.bound.facts,
            images=traces,
            layers=layers,
            drops=prefill.drops,
            original_lengths=layout.valid.sum(1).tolist(),
            past=past,
            shape=record.bound.shape,
            between_layers=frozenset().union(*(s.between_layers for s in record.plan.encoder)),
            past_mask=mask[:, :past] if past and mask is not None else None,
            kv_itemsize=cache.itemsize,
        )
        self.prefills += 1
        totals = [sum(sum(c) for c in layer.counts) for layer in layers]
        self._sums = [a + b for a, b in zip(self._sums or [0] * len(totals), totals)]
        self._rows += len(layout.columns)
        for observer in self.observers:
            observer(self)

    def mean_visual_tokens(self) -> list[float]:
        """Visual tokens per decoder layer, mean over all prompts since patching."""
        return [s / max(self._rows, 1) for s in self._sums]

    def kept(self, layer: int | None = None, batch_row: int = 0) -> list[Token]:
        """Visual tokens alive in a decoder layer of the newest prefill, in sequence order.

        Args:
            layer: 0-based, negative counts from the end; None: the last layer.
            batch_row: row of the batch.

        Raises:
            RuntimeError: no prefill with images was recorded.
            IndexError: no such layer or batch row.
        """
        from tokprune.trace.provenance import decoder_tokens

        prefill = self._need()
        rows, layers = len(prefill.original_lengths), len(prefill.layers)
        if not 0 <= batch_row < rows:
            raise IndexError(f"batch_row={batch_row} should be in [0, {rows - 1}]")
        at = -1 if layer is None else layer
        if not -layers <= at < layers:
            raise IndexError(f"layer={layer} should be in [{-layers}, {layers - 1}]")
        return [
            token
            for image in prefill.images
            if image.row == batch_row
            for token in decoder_tokens(prefill, image, at)
        ]

    def summary(self) -> str:
        """Plain-text table: tokens, KV and FLOPs per layer, totals, and what was saved."""
        from tokprune.trace.summary import summary

        return summary(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything that is known of the newest prefill, in JSON types.

        ``images``: per image (or part of a video, with its ``frames`` [first, number]; a token's
        ``tile`` is then the frame) its ``stages`` (encoder layers that reduce, ``prompt``, runs of
        equal decoder layers), each with its ``tokens`` (:class:`tokprune.trace.provenance.Token`).
        ``encoder``, ``decoder``: per layer token counts, positions, KV and MACs. ``macs`` and
        ``macs_unpruned``: FLOPs = 2 × MACs. ``recorded`` is False, and the rest missing, where no
        prefill with images ran.
        """
        from tokprune.trace.summary import to_dict

        return to_dict(self)

    def _need(self) -> PrefillTrace:
        if self.last is None:
            raise RuntimeError(
                "no prefill with images was recorded: run the patched model on a prompt with an "
                "image first (text-only prompts pass through untouched and leave no trace)"
            )
        return self.last
