"""Stages that look at a vision encoder whose patches the model merges after it.

Attention is tapped, nothing changes, and what they find is averaged over the patches of a cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.check import Contracts
from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    Rectify,
    TowerFacts,
    TowerInput,
    TowerTokens,
)
from tokprune.engine.encoder import initial_tokens
from tokprune.engine.images import ImageRecord
from tokprune.engine.masks import check_backend
from tokprune.engine.model import ImageLayout, ObservedTower
from tokprune.engine.tap import Call, tapped_backend


@dataclass
class _Group:
    """Rows that one call of an attention module may hold: all tiles of a call, or a frame."""

    tower: TowerInput
    tokens: TowerTokens
    runs: list[EncoderRun]


class ObservedPass:
    """One forward of an encoder that stages only look at. A tower that packs its images attends to
    every frame by itself, in one call of the attention backend or in one a frame."""

    #: as of a :class:`~tokprune.engine.encoder.TowerPass`
    reduced = False

    def __init__(
        self, stages: tuple[EncoderStage, ...], facts: TowerFacts, tower: ObservedTower,
        layouts: list[ImageLayout] | None, device: torch.device, contracts: Contracts,
        frames: int = 0, rectify: Rectify | None = None,
    ) -> None:  # fmt: skip
        """``frames``: of the video that the pass sees a part of."""
        self.rectify = rectify
        self.stages, self.contracts, self.packed = stages, contracts, tower.packed
        self.facts, self.device = facts, device
        self.outcomes: list[EncoderOutcome] = []
        #: what the stages looked at last
        self.seen: Tensor | None = None
        #: groups that a layer's attention has met so far
        self._met: dict[int, int] = {}
        self.groups: list[_Group] = []
        if layouts is None:
            return  # how many tiles there are, the first call tells
        if not tower.packed:
            images = tuple(i for i, layout in enumerate(layouts) for _ in range(layout.tiles))
            self._add(TowerInput(facts, images, device))
            return
        for layout in layouts:
            assert layout.segments is not None
            assert layout.token_grid is not None
            for rows, (height, width) in zip(layout.segments.full, layout.token_grid.grids):
                grid = (height * facts.merges, width * facts.merges)
                own = replace(facts, grid=grid, tokens_per_tile=rows)
                whole = frames or layout.tiles
                self._add(TowerInput(own, (0,), device, packed=not tower.raster, frames=whole))

    def _add(self, tower: TowerInput) -> None:
        runs = [self.contracts.run(stage, stage.start(tower)) for stage in self.stages]
        self.groups.append(_Group(tower, initial_tokens(tower), runs))

    def attention(self, layer: int, call: Call) -> None:
        self.seen = call.query
        if not self.packed:
            if not self.groups:
                tiles = tuple(range(call.query.shape[0]))
                self._add(TowerInput(self.facts, tiles, self.device))
            self._show(self.groups[0], layer, call)
            return
        start = 0
        while start < call.query.shape[2]:
            number = self._met.get(layer, 0)
            group, self._met[layer] = self.groups[number], number + 1
            end = start + group.tokens.rows
            part = replace(
                call, query=call.query[:, :, start:end], key=call.key[:, :, start:end],
                value=call.value[:, :, start:end], mask=None,
            )  # fmt: skip
            self._show(group, layer, part)
            start = end

    def _show(self, group: _Group, layer: int, call: Call) -> None:
        mask = call.mask
        if mask is not None and mask.dim() == 4:  # padding, the same for all queries
            rows = mask[:, 0, 0]
            mask = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
        attention = Attention(
            call.query, call.key, call.value, call.scaling, causal=False, mask=mask
        )
        for stage, run in zip(self.stages, group.runs):
            if layer in stage.taps:
                run.attention(layer, attention, group.tokens)

    def finish(self) -> None:
        self.outcomes = [
            self.contracts.outcome(run, run.finish(g.tokens), g.tokens, g.tower.facts)
            for g in self.groups
            for run in g.runs
        ]

    def fill(self, records: list[ImageRecord]) -> None:
        """Give every image what was found of its tiles or frames."""
        for name in ("score", "tag", "metric"):
            found = [own for o in self.outcomes if (own := getattr(o, name)) is not None]
            tiles = [tile for own in found for tile in own]  # [N] or [N, d] each
            if not tiles:
                continue
            start = 0
            for record in records:
                token_grid, count = record.layout.token_grid, record.layout.tiles
                assert token_grid is not None
                assert token_grid.mean is not None
                own = torch.stack(tiles[start : start + count])
                start += count
                cells = token_grid.mean(own.float()).to(record.device)
                setattr(record, name, cells > 0 if name == "tag" else cells)


def install_observers(
    tower: ObservedTower, stages: tuple[EncoderStage, ...],
    current: Callable[[], ObservedPass | None], tap: Callable[..., Any],
) -> list[Any]:  # fmt: skip
    """Taps on the attention modules that the stages look at; ``current()``: the pass that runs."""

    def function(number: int) -> Callable[[Call], None]:
        def observe(call: Call) -> None:
            if (now := current()) is not None:
                now.attention(number, call)

        return observe

    layers = sorted({layer for stage in stages for layer in stage.taps})
    if layers:
        check_backend(tapped_backend(tower.attentions[0]), "vision tower")
    return [
        tap(tower.attentions[n], function(n), lambda: current() is not None) for n in layers
    ]  # fmt: skip
