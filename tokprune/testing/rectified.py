"""What rectified attention adds to the logits of the oracle, worked out once more by itself."""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.contracts import Rectify
from tokprune.engine.model import Block, Parts
from tokprune.trace import PrefillTrace


class Terms:
    """The terms of all decoder layers of an unpruned model, for what ``trace`` tells of its
    tokens."""

    def __init__(self, rectify: Rectify, trace: PrefillTrace, parts: Parts) -> None:
        self.rectify, self.trace, self.parts = rectify, trace, parts
        #: by layer cos and sin [B, keys, f] of what it has seen
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}

    def add(
        self, number: int, columns: list[Tensor], block: Block, kwargs: dict[str, Any],
        seen: Tensor, prefill: bool, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Put them into a layer's mask. ``columns``: of every batch row, where the oracle reads the
        prompt's tokens; ``seen`` [B, queries, keys] bool."""
        bias = torch.zeros(seen.shape)
        for row, own in enumerate(columns):
            for column, size in zip(own.tolist(), self.sizes(number, row)):
                bias[row, :, column] = log(size)
        if self.rectify.distance:
            far = self._far(number, block, kwargs)
            for row in range(len(columns)):
                if self.changed(number, row) and (prefill or self.rectify.distance_in_decode):
                    bias[row] += far[row]
        mask = bias.masked_fill(~seen, torch.finfo(dtype).min)
        kwargs["attention_mask"] = mask[:, None].to(dtype)

    def _counts(self, row: int) -> list[int]:
        """Tokens of the images of a row before anything was dropped."""
        images = sorted((i.number, len(i.columns)) for i in self.trace.images if i.row == row)
        return [count for _, count in images]

    def changed(self, number: int, row: int) -> bool:
        return list(self.trace.layers[number].counts[row]) != self._counts(row)

    def sizes(self, number: int, row: int) -> list[float]:
        layer = self.trace.layers[number]
        real = layer.column[row] >= 0
        if layer.size is None or not self.rectify.size:
            return [1.0] * int(real.sum())
        sizes = layer.size[row][real].tolist()
        if number or self.rectify.first_layer == "size":
            return sizes
        before = self._counts(row)
        images = layer.segment[row][real].tolist()
        return [1.0 if i < 0 else before[i] / layer.counts[row][i] for i in images]

    def _far(self, number: int, block: Block, kwargs: dict[str, Any]) -> Tensor:
        """log(c − D) [B, queries, keys]."""
        table: Any = kwargs.get("position_embeddings")
        if "position_embeddings_global" in kwargs:  # two, in transformers 4
            local = block.window is not None
            table = kwargs[f"position_embeddings_{'local' if local else 'global'}"]
        cos, sin = (self._by_frequency(x) for x in table)
        whole = cos, sin
        if number in self.tables:
            before = self.tables[number]
            whole = torch.cat([before[0], cos], 1), torch.cat([before[1], sin], 1)
        self.tables[number] = whole
        return self.distances((cos, sin), whole)

    def distances(self, query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
        """log(c − D) [B, queries, keys] of cos and sin [B, n, f]."""
        turned = (query[0] ** 2 + query[1] ** 2).mean(-1)[:, :, None]  # the tables' own factor
        same = query[0][:, :, None] * key[0][:, None] + query[1][:, :, None] * key[1][:, None]
        return (self.rectify.c - same.mean(-1) / turned).log()

    def _by_frequency(self, table: Tensor) -> Tensor:
        """[B, n, f]: of a table [3, B, n, f] every frequency on the axis that turns it."""
        if table.dim() == 3:
            return table
        config = self.parts.language_model.config
        sections = config.rope_scaling["mrope_section"]
        axes = [axis for axis, n in enumerate(sections) for _ in range(n)] * 2
        return torch.stack([table[axis, ..., f] for f, axis in enumerate(axes)], -1)
