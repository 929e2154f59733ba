"""Rectified attention (:class:`~tokprune.engine.contracts.Rectify`): what a decoder layer's logits
get, and how it reaches the layer's attention.

A term of the keys alone goes along with the layer's arguments, which transformers hands on to its
attention function (:mod:`tokprune.engine.tap`): there it becomes channels of queries and keys, and
any kernel runs. A term of queries and keys is part of the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.cache import CompressedLayer
from tokprune.engine.checkpointing import is_checkpointed
from tokprune.engine.contracts import Rectify, SequenceView
from tokprune.engine.layer_calls import LayerCalls, View
from tokprune.engine.model import Block
from tokprune.engine.once import Once
from tokprune.engine.positions import first, made_by
from tokprune.engine.static_cache import CompressedStaticLayer
from tokprune.engine.tap import BIAS
from tokprune.errors import UnsupportedModelError
from tokprune.operators.rectified import distance_bias

Table = tuple[Tensor, Tensor]


def check_rectify(rectify: Rectify | None, backend: str, config: Any, legacy: bool) -> None:
    """Whether a decoder's attention can be rectified.

    Raises:
        UnsupportedModelError: the kernel takes no term of queries and keys, or bounds its logits;
            or attention of transformers 4.37, which is no function of its own.
    """
    if rectify is None:
        return
    if legacy:
        raise UnsupportedModelError(
            "rectify needs transformers ≥ 4.57, whose attention is a function that can be handed "
            "more; leave rectify out on the original llava package"
        )
    if not backend.startswith("flash"):
        return
    if rectify.distance:
        raise UnsupportedModelError(
            f"rectify with distance=True adds a term of queries and keys, which {backend!r} does "
            "not take; load the model with attn_implementation='sdpa', or use rectify='size'"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(
            f"rectify adds to logits that this decoder bounds inside {backend!r}; load the model "
            "with attn_implementation='eager', or leave rectify out"
        )


class Rectifier:
    """What one forward adds. ``native``: the prompt of a prefill, before anything was dropped."""

    def __init__(
        self, rectify: Rectify, calls: LayerCalls, native: SequenceView | None = None
    ) -> None:
        self.rectify, self.calls, self.native = rectify, calls, native
        self.once = Once()
        #: whether the layer about to run is handed a term
        self.biased = False

    # ------------------------------------------------------------------ a prompt

    def table(self, kwargs: dict[str, Any], block: Block) -> Any:
        """The rotary table that a layer works with, as its model made it; None without any."""
        local = kwargs.get("position_embeddings_local")
        if local is not None and block.window is not None:
            return local
        names = (name for name in kwargs if name.startswith("position_embeddings"))
        return next((kwargs[name] for name in names if kwargs[name] is not None), None)

    def prefill(
        self, number: int, block: Block, held: Any, sequence: SequenceView, view: View,
        position: Tensor, made: Any, shift: Callable[[], Tensor], kwargs: dict[str, Any],
        hidden: Tensor,
    ) -> Keys:  # fmt: skip
        """Hand a layer what its logits get, in ``kwargs``, and say what its cache is to know of its
        keys. ``held``: the layer of the cache with earlier turns, or None; ``position``: rotary
        positions of the sequence; ``made``: the table that the model made for it; ``shift()``:
        by how much the positions of later tokens are below their columns, [B]."""
        earlier = held if isinstance(held, CompressedLayer) else None
        own = self._log_sizes(number, sequence)
        keys = Keys(self._with_earlier(own, earlier, view))
        if self.rectify.distance:
            keys.rectified = self._rows(sequence, earlier)
        if keys.rectified is None:
            mask = None
            if keys.log_sizes is not None and self._recomputed(block):
                mask = self._mask(kwargs, view, keys, None, hidden)
            self._hand(kwargs, keys.log_sizes, mask)
            return keys
        given = self.table(kwargs, block)
        table = whole = self.once("own", lambda: self._read(given), first(given))
        keys.rotary = self._rotary(sequence, view, held, position)
        keys.rotary_shift = self.once("shift", shift, position)
        entries = view.keys.shape[1] - view.queries.shape[1]
        if entries:
            ids = keys.rotary[..., :entries]
            before = self.once("before", lambda: self._made(made, ids), keys.rotary, first(made))
            whole = self.once("whole", lambda: _joined(before, table), before[0], table[0])
        self._hand(kwargs, keys.log_sizes, self._mask(kwargs, view, keys, (table, whole), hidden))
        return keys

    def _log_sizes(self, number: int, sequence: SequenceView) -> Tensor | None:
        """[B, L'] of a sequence in a layer; None: every token stands for itself."""
        rectify = self.rectify
        if not rectify.size or sequence.size is None:
            return None
        uniform = number == 0 and rectify.first_layer == "uniform"

        def make() -> Tensor:
            assert self.native is not None
            size = sequence.size
            assert size is not None
            if uniform:
                width = max(1, sequence.segments)
                shares = torch.ones(len(sequence.counts), width + 1)
                for row, (now, before) in enumerate(zip(sequence.counts, self.native.counts)):
                    for image, (n, whole) in enumerate(zip(now, before)):
                        shares[row, image] = whole / max(1, n)
                segment = torch.where(sequence.visual, sequence.segment, width)
                size = shares.to(size.device, non_blocking=True).gather(1, segment)
            return size.log()

        made: Tensor = self.once("log sizes", make, sequence, int(uniform))
        return made

    def _with_earlier(
        self, own: Tensor | None, earlier: CompressedLayer | None, view: View
    ) -> Tensor | None:
        """Log sizes [B, m] of all keys, or None."""
        before = None if earlier is None else earlier.all_log_sizes()
        if own is None and before is None:
            return None
        entries = view.keys.shape[1] - view.queries.shape[1]

        def make() -> Tensor:
            tail = own
            if tail is None:
                tail = torch.zeros(view.queries.shape, device=view.keys.device)
            head = before
            if head is None:
                head = tail.new_zeros(tail.shape[0], entries)
            return torch.cat([head.to(tail.device), tail], dim=1)

        if not entries:
            return own
        source = None if earlier is None else earlier.log_sizes
        made: Tensor = self.once("keys", make, own, source, view)
        return made

    def _rows(self, sequence: SequenceView, earlier: CompressedLayer | None) -> Tensor | None:
        """[B] bool: rows of whose images something is gone; None: none."""
        assert self.native is not None
        changed = [now != before for now, before in zip(sequence.counts, self.native.counts)]
        known = None if earlier is None else earlier.rectified
        if known is None and not any(changed):
            return None

        def make() -> Tensor:
            rows = torch.tensor(changed).to(sequence.column.device, non_blocking=True)
            return rows if known is None else rows | known.to(rows.device)

        made: Tensor = self.once("rows", make, sequence, known)
        return made

    def _rotary(self, sequence: SequenceView, view: View, held: Any, position: Tensor) -> Tensor:
        """Rotary positions [B, axes, m] of all keys."""
        known = held.rotary if isinstance(held, CompressedLayer) else None

        def make() -> Tensor:
            own = position[:, None] if position.dim() == 2 else position.transpose(0, 1)
            own = own.expand(len(sequence.lengths), -1, -1)
            entries = view.keys.shape[1] - view.queries.shape[1]
            if not entries:
                return own
            if known is not None:
                before = held.all_rotary().to(own.device)
            else:  # text: it stood as far below its columns as this prompt's first token
                at = (view.queries >= 0).to(torch.int8).argmax(1, keepdim=True)
                below = view.queries.gather(1, at) - own[:, 0].gather(1, at)
                before = (view.keys[:, :entries] - below).clamp(min=0)
                before = before[:, None].expand(-1, own.shape[1], -1)
            return torch.cat([before, own], dim=2)

        made: Tensor = self.once("rotary", make, position, view, known)
        return made

    # ------------------------------------------------------------------ later tokens

    def in_steps(self, layer: CompressedLayer) -> bool:
        """Whether tokens after the prompt have the distance term in a layer.

        Raises:
            UnsupportedModelError: they should, on a static cache.
        """
        if not self.rectify.distance_in_decode or layer.rectified is None:
            return False
        if isinstance(layer, CompressedStaticLayer):
            raise UnsupportedModelError(
                "rectify with distance_in_decode=True needs the positions of all that is cached, "
                "which past_key_values=StaticCache does not keep; use DynamicCache (the default) "
                "or distance_in_decode=False"
            )
        return True

    def step(
        self, layer: CompressedLayer, view: View | None, made: Any, kwargs: dict[str, Any],
        hidden: Tensor,
    ) -> None:  # fmt: skip
        """Hand a layer of a forward without images what its logits get. ``view``: where it has the
        distance term; ``made``: the table that the model made for it."""
        log_sizes: Tensor | None = None
        if layer.log_sizes is not None:
            more = hidden.shape[1]
            log_sizes = self.once(
                "keys", lambda: layer.log_sizes_behind(more), layer.log_sizes, layer.entries
            )
        if view is None or layer.rectified is None:
            self._hand(kwargs, log_sizes, None)
            return
        keys = Keys(log_sizes, rectified=layer.rectified)

        def rotary() -> Tensor:
            known = layer.all_rotary()
            assert known is not None
            assert layer.rotary_shift is not None
            new = view.queries.to(known.device) - layer.rotary_shift[:, None]
            return torch.cat([known, new[:, None].expand(-1, known.shape[1], -1)], dim=2)

        ids = self.once("rotary", rotary, layer.rotary, layer.entries)
        whole = self.once("whole", lambda: self._made(made, ids), ids, first(made))
        own = self.once("own", lambda: _last(whole, view.queries.shape[1]), whole[0])
        self._hand(kwargs, log_sizes, self._mask(kwargs, view, keys, (own, whole), hidden))

    # ------------------------------------------------------------------ both

    def _hand(self, kwargs: dict[str, Any], log_sizes: Tensor | None, mask: Tensor | None) -> None:
        kwargs.pop(BIAS, None)
        if mask is not None:
            kwargs["attention_mask"] = kwargs[BIAS] = mask
        elif log_sizes is not None:
            kwargs[BIAS] = log_sizes
        self.biased = BIAS in kwargs

    def _recomputed(self, block: Block) -> bool:
        """Whether a layer runs again in the backward pass, where the model may not be patched any
        more: what its attention is handed would then be read by nobody, but its mask is."""
        return is_checkpointed(block.module) and not self.calls.backend.startswith("flash")

    def _mask(
        self, kwargs: dict[str, Any], view: View, keys: Keys, tables: tuple[Table, Table] | None,
        hidden: Tensor,
    ) -> Tensor:  # fmt: skip
        """The layer's mask with all terms added: [B, 1, n, m] in the dtype of its scores.
        ``tables``: of queries and keys, for the distance term."""
        mask, rows = kwargs.get("attention_mask"), keys.rectified

        def make() -> Tensor:
            bias = torch.zeros(*view.queries.shape, 1, device=hidden.device)
            if tables is not None:
                assert rows is not None
                bias = distance_bias(*tables, self.rectify.c).to(hidden.device)
                bias = bias * rows.to(bias.device)[:, None, None]
            if keys.log_sizes is not None:
                bias = bias + keys.log_sizes.to(bias.device)[:, None]
            given = mask
            if given is None:
                given = view.queries[:, :, None] >= view.keys[:, None, :]
                given = (given & (view.keys >= 0)[:, None, :])[:, None]
            bias, given = bias[:, None], given.to(bias.device)
            if given.dtype == torch.bool:
                bias = bias.masked_fill(~given, torch.finfo(hidden.dtype).min)
            else:
                bias = (bias + given.float()).clamp(min=torch.finfo(hidden.dtype).min)
            return bias.to(hidden.dtype)

        # torch.compile compares no tuples
        known = (None, None) if tables is None else (tables[0][0], tables[1][0])
        made: Tensor = self.once("mask", make, mask, view, keys.log_sizes, *known, rows)
        return made

    def _made(self, table: Any, ids: Tensor) -> Table:
        """What the module that made a table makes of positions [B, axes, n]."""
        by_axis = ids[:, 0] if ids.shape[1] == 1 else ids.transpose(0, 1)
        return self._read(made_by(self.calls.rotary, table).again(by_axis))

    def _read(self, table: Any) -> Table:
        """cos and sin [B, n, f] of a rotary table."""
        if not isinstance(table, tuple | list) or len(table) != 2 or table[0].is_complex():
            raise UnsupportedModelError(
                "rectify with distance=True reads tables of cos and sin, and this decoder's layers "
                "get none; use rectify='size'"
            )
        if table[0].dim() == 4:
            return self._of_sections(table[0]), self._of_sections(table[1])
        return table[0], table[1]

    def _of_sections(self, table: Tensor) -> Tensor:
        """A table [3, B, n, f] of all axes, of every frequency the axis that turns it."""
        config = self.calls.language_model.config
        scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", {})
        sections = list(scaling["mrope_section"]) * 2
        parts = table.split(sections, dim=-1)
        return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)


class Keys:
    """What is known of a layer's keys: ``log_sizes`` [B, m], ``rotary`` [B, axes, m] and
    ``rotary_shift`` [B], and the rows ``rectified`` [B] that the distance term is for; or None."""

    def __init__(self, log_sizes: Tensor | None, rectified: Tensor | None = None) -> None:
        self.log_sizes, self.rectified = log_sizes, rectified
        self.rotary: Any = None
        self.rotary_shift: Tensor | None = None

    def tell(self, layer: CompressedLayer) -> None:
        """Tell a layer of the cache."""
        layer.log_sizes, layer.rectified = self.log_sizes, self.rectified
        layer.rotary, layer.rotary_shift = self.rotary, self.rotary_shift


def _joined(before: Table, own: Table) -> Table:
    batch = max(len(before[0]), len(own[0]))
    return tuple(  # type: ignore[return-value]
        torch.cat([x.expand(batch, -1, -1), y.expand(batch, -1, -1)], dim=1)
        for x, y in zip(before, own)
    )


def _last(table: Table, n: int) -> Table:
    return table[0][:, -n:], table[1][:, -n:]
