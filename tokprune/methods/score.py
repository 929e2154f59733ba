"""SCoRe: the most attended patch, then those far from all kept ones, weighted by attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from tokprune.methods.base import Preset
from tokprune.methods.options import Range
from tokprune.methods.registry import register_method
from tokprune.methods.tile_selector import Tiles, TileSelector
from tokprune.operators.score import salient_k_center

_NOTE = "SCoRe, CVPR 2026, as others describe it: alpha 0.8"


@register_method
@dataclass(frozen=True)
class SCoRe(TileSelector):
    """Of every tile, one patch after another is kept: first the one that the class token attends to
    most, then always the one for which the cosine distance to the nearest kept patch, times the
    attention ** alpha, is largest. Text-agnostic.

    Attention and features are those of the layer that the model reads, before the projector. There
    is no official code, and the paper was not read: the formula is as others give it; the layer,
    the mean over heads (a factor does not matter) and what is done with tiles are ours.

    Args:
        keep: tokens of each tile (count), or fraction of its patches.
        alpha: exponent of the attention, at least 0: 0 is farthest-first (DivPrune from another
            first patch); the larger, the closer to the most attended patches alone.
        score: "cls", or "mean_received": the mean attention that a patch receives from all others,
            which "cls" means as well where the tower has no class token.
        order: on tiled models: "spatial" chooses among the patches that show the image; with
            "published" padding competes.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image", whose tiles then share it.

    Source: Xu, Shi, Gao, "SCoRe: Salience-Coverage Reduction for Vision Token Pruning", CVPR 2026.
    Not SCOPE, which sums what a patch covers of all others.
    """

    name = "score"
    needs: ClassVar[str] = "class-token attention and features of one layer"
    paper = "CVPR 2026"
    source = "paper's equations"
    presets = tuple(Preset("llava-1.5", keep, {"keep": keep}, _NOTE) for keep in (128, 64, 32))

    alpha: Annotated[float, Range(0)] = 0.8

    def choose(self, tiles: Tiles, keep: int) -> Tensor:
        return salient_k_center(tiles.features, tiles.score, keep, self.alpha)
