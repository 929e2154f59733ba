"""HiPrune: patches that a middle encoder layer attends to, their neighbours, and those of a deep
layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from tokprune.engine.contracts import Attention, TowerTokens
from tokprune.engine.model import TowerFacts
from tokprune.methods.base import Preset
from tokprune.methods.options import AtLeast, Range
from tokprune.methods.registry import register_method
from tokprune.methods.tile_selector import TileChooser, Tiles
from tokprune.methods.tiles import feature_layer
from tokprune.operators.hiprune import anchors_and_registers

_CODE = "HiPrune README, Danielement321/HiPrune: alpha 0.1, layer {} counted from 1"


@register_method
@dataclass(frozen=True)
class HiPrune(TileChooser):
    """Of every tile, keep the few patches that a middle encoder layer attends to most (anchors)
    with their four neighbours, and fill up with those of the layer that the model reads. Attention
    is what a patch receives, mean over heads and over all queries, the class token's and its own
    among them; no class token is needed. Text-agnostic.

    Every image has its own budget, whatever else is in the batch; the official code divides one
    among all images of a call. The grid is the tower's own; the official code knows 24×24.

    Args:
        keep: tokens of each tile (count), or fraction of its patches, rounded.
        alpha: share of the budget for anchors and their neighbours: round(keep · alpha/5) anchors,
            halves to even.
        object_layer: encoder layer, counted from 0, whose attention makes anchors. None: as
            published, the 9th of 24 (index 8), and the 16th of 32 (index 15) where the model makes
            one token of several patches; at the same share of the depth in other towers (ours).
        strict_neighbours: only patches that share an edge are neighbours. Else, as in the official
            code, the next in raster order are: behind a row's end comes the next row, and above the
            first row stands the first patch.
        order: on tiled models: "spatial" chooses among the patches that show the image; "published"
            lets padding compete, as the official code does.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image", whose tiles then share it.

    Source: "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention", ACL 2026,
    arXiv 2508.00553.
    """

    name = "hiprune"
    needs: ClassVar[str] = "attention received in two encoder layers"
    paper = "arXiv 2508.00553"
    presets = (
        *(
            Preset("llava-1.5", keep, {"keep": keep, "object_layer": 8}, _CODE.format(9))
            for keep in (192, 128, 64)
        ),
        *(
            Preset(
                "llava-next", keep, {"keep": keep, "scope": "image", "object_layer": 8},
                _CODE.format(9),
            )
            for keep in (640, 320, 160)
        ),
        *(
            Preset("qwen2.5-vl", keep, {"keep": keep, "object_layer": 15}, _CODE.format(16))
            for keep in (0.334, 0.223, 0.112)
        ),
    )  # fmt: skip

    alpha: Annotated[float, Range(0, 1)] = 0.1
    object_layer: Annotated[int, AtLeast(0)] | None = None
    strict_neighbours: bool = False

    def layers(self, tower: TowerFacts) -> tuple[int, ...]:
        """Raises:
        ValueError: ``object_layer`` lies behind the layer that the model reads.
        """
        deep, middle = feature_layer(tower, "HiPrune"), self.object_layer
        if middle is None:
            share = 16 / 32 if tower.merges > 1 else 9 / 24
            middle = min(deep, max(0, round(share * tower.encoder_layers) - 1))
        if middle > deep:
            raise ValueError(
                f"object_layer={middle} should be at most {deep}, the encoder layer that this "
                "model reads (counted from 0)"
            )
        return middle, deep

    def counts(self, patches: int, tiles_per_image: Sequence[int]) -> list[int]:
        if isinstance(self.keep, float):
            return [max(1, round(self.keep * patches))] * sum(tiles_per_image)
        return super().counts(patches, tiles_per_image)

    def look(self, attention: Attention, tokens: TowerTokens) -> Tensor:
        return attention.received()[:, tokens.first_patch :]

    def choose(self, tiles: Tiles, keep: int) -> Tensor:
        return anchors_and_registers(
            tiles.scores[0], tiles.score, keep, self.alpha, tiles.grid, tiles.cells,
            self.strict_neighbours,
        )  # fmt: skip
