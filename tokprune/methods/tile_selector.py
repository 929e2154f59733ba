"""Base of methods that choose patches of every tile by what the vision encoder shows of them.

The whole of a method that keeps what the class token attends to::

    @register_method
    @dataclass(frozen=True)
    class ByClassToken(TileSelector):
        name = "by-class-token"

        def choose(self, tiles: Tiles, keep: int) -> Tensor:
            return rank(tiles.score)[:, :keep]

Where a tower's rows can change, patches go behind the layer that the model reads, before the
projector. Where the model makes one token of several patches, tokens go at the language-model
input, and what was seen of their patches is averaged. :class:`TileChooser` leaves open what is
looked at, and in which layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.engine.contracts import Attention, Order, Plan, TowerTokens
from tokprune.engine.model import ImageLayout, ModelFacts, TowerFacts
from tokprune.methods.anchors import Anchors
from tokprune.methods.base import check_fits, resolve_keep
from tokprune.methods.tile_stages import AtInput, InTower, Observer, Tiles
from tokprune.methods.tiles import TileMethod, feature_layer, shown_cells, tiles_of
from tokprune.methods.tower_rows import Window
from tokprune.operators.visionzip import Score

__all__ = ["TileChooser", "TileSelector", "Tiles"]


@dataclass(frozen=True)
class TileChooser(TileMethod):
    """Keeps ``keep`` patches of every tile; no text, no merging.

    On tiled models the tokens of the base tile enter first, then those of all crops in raster order
    of the stitched image; newline tokens go.

    Args:
        keep: tokens of each tile (count), or fraction of its patches.
        order: on tiled models: "spatial" chooses among the patches that show the image, so a tile
            that shows little keeps less; "published" as the official codes of such methods,
            where padding competes and may be kept.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image", whose tiles then share it
            equally.
        anchors: the share of an image's budget that goes to tokens which others are merged into, or
            a mapping with the options of :class:`~tokprune.methods.anchors.Anchors`; None: none.
            The choice is then made at the language-model input, and sees the tokens there.
    """

    stages: ClassVar[tuple[str, ...]] = ("encoder, feature layer",)
    without_tower_rows: ClassVar[str] = (
        "chooses at the language-model input, not at the feature layer"
    )

    order: Order = "spatial"
    anchors: Anchors | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchors", Anchors.of(self.anchors))
        super().__post_init__()

    def layers(self, tower: TowerFacts) -> tuple[int, ...]:
        """The encoder layers looked at (0-based), ascending."""
        return (feature_layer(tower, self.name),)

    @abstractmethod
    def look(self, attention: Attention, tokens: TowerTokens) -> Tensor:
        """Of one layer's attention a number [B, N] for every patch, float32."""

    @abstractmethod
    def choose(self, tiles: Tiles, keep: int) -> Tensor:
        """The patches that stay, [B, keep] long in any order, none twice; keep < N."""

    def counts(self, patches: int, tiles_per_image: Sequence[int]) -> list[int]:
        """Patches to keep of every tile, image by image."""
        keep = self.keep
        assert keep is not None
        if self.scope == "tile" or isinstance(keep, float):
            return [resolve_keep(keep, patches)] * sum(tiles_per_image)
        each = [min(patches, max(1, keep // tiles)) for tiles in tiles_per_image]
        return [count for count, tiles in zip(each, tiles_per_image) for _ in range(tiles)]

    def plan(self, facts: ModelFacts) -> Plan:
        tower = facts.need_tower(self.name, whole=False)
        assert self.keep is not None
        if facts.tower is None or self.anchors is not None:
            check_fits(self.keep, facts)
            return Plan(encoder=(Observer(self, tower),), prompt=(AtInput(self),))
        whole = self.tile_budget(facts) == tower.patches
        stills = (
            () if whole else (InTower(self, tower, pooled_videos=facts.frame_grid is not None),)
        )
        if facts.frame_grid is None:
            return Plan(encoder=stills)
        watch = stills or (Observer(self, tower),)
        return Plan(encoder=watch, prompt=(AtInput(self, videos_only=True),))

    def fixed_count(self, facts: ModelFacts, layout: ImageLayout) -> int | None:
        tower = facts.tower
        if tower is None or self.anchors is not None:
            return self._count_at_input(facts, layout)
        counts = self.counts(tower.patches, [layout.tiles])
        if counts[0] == tower.patches:
            return layout.count
        if tower.tiled and self.order == "spatial":
            counts = [min(n, shown) for n, shown in zip(counts, shown_cells(tower, layout))]
        return sum(counts) + layout.tiles * int(tower.cls_in_features)

    def _count_at_input(self, facts: ModelFacts, layout: ImageLayout) -> int:
        """What :class:`~tokprune.methods.tile_stages.AtInput` leaves."""
        tiles = tiles_of(facts, layout)
        sizes = [size for size, _ in tiles]
        counts = [self.counts(size, [len(sizes)])[0] for size in sizes]
        left = sum(min(n, shown) for n, (_, shown) in zip(counts, tiles))
        return layout.count if counts == sizes or left == layout.patches else left

    def chosen(self, tiles: Tiles, counts: list[int], windows: Sequence[Window | None]) -> Tensor:
        """The patches of every tile that stay, ascending, [B, most]; −1 at the end of tiles that
        keep fewer. ``counts``, ``windows``: of each tile (host)."""
        result = torch.full((len(counts), max(counts)), -1, device=tiles.cells.device)
        groups: dict[tuple[Window | None, int], list[int]] = {}
        for tile, like in enumerate(zip(windows, counts)):
            groups.setdefault(like, []).append(tile)
        for (window, count), members in groups.items():
            at = torch.tensor(members).to(result.device, non_blocking=True)
            own, seen = tiles.part(at, window)
            n = own.cells.shape[1]
            index = torch.arange(n, device=result.device).expand(len(at), n)
            if count < n:
                index = self.choose(own, count).sort(-1).values
            result[at, :count] = index if seen is None else seen[index]
        return result


@dataclass(frozen=True)
class TileSelector(TileChooser):
    """Chooses by the attention of one layer.

    Args:
        score: "cls" looks at the class token's attention; "mean_received" at the mean attention
            that a patch receives from all others, which "cls" means as well where the tower has
            no class token.
        keep, order, positions, scope: as of every :class:`TileChooser`.
    """

    needs: ClassVar[str] = "class-token attention of one layer"
    without_class_token: ClassVar[str] = (
        "the mean attention that a patch receives stands in for the class token's"
    )

    score: Score = "cls"

    def look(self, attention: Attention, tokens: TowerTokens) -> Tensor:
        if tokens.has_cls and self.score == "cls":
            return attention.cls_row().mean(1)[:, 1:]
        return attention.received(others_only=True)[:, tokens.first_patch :]
