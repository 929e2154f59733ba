"""VisPruner: half the patches by the class token's attention, half because nothing repeats them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from tokprune.methods.base import Preset
from tokprune.methods.options import Range
from tokprune.methods.registry import register_method
from tokprune.methods.tile_selector import Tiles, TileSelector
from tokprune.operators.vispruner import important_and_diverse

_PAPER = "VisPruner, arXiv 2412.01818v2; important_ratio 0.5 is the code's default"


@register_method
@dataclass(frozen=True)
class VisPruner(TileSelector):
    """Of every tile, keep the patches that the class token attends to most at the layer the model
    reads (mean over heads), and of all others those left when look-alikes have been removed, eight
    at a time. Text-agnostic.

    Any budget is possible: the official code stops at some, whose lists of patches are of odd
    length or too short for a round of eight. Similarities are float32; still, which diverse patches
    remain can hang on their last bits, since every round decides who is compared in the next.

    Args:
        keep: tokens of each tile (count), or fraction of its patches.
        important_ratio: share of the budget for the most attended patches, rounded down; 1 is pure
            attention, 0 pure removal of duplicates.
        score: "cls", or "mean_received": the mean attention that a patch receives from all others,
            which "cls" means as well where the tower has no class token.
        order: on tiled models: "spatial" chooses among the patches that show the image; "published"
            lets padding compete, as the official code does.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image", whose tiles then share it.

    Source: Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token
    Pruning in VLMs", ICCV 2025, arXiv 2412.01818v2.
    """

    name = "vispruner"
    needs: ClassVar[str] = "class-token attention and features of one layer"
    paper = "arXiv 2412.01818v2"
    presets = (
        *(Preset("llava-1.5", keep, {"keep": keep}, _PAPER) for keep in (192, 128, 64, 32)),
        *(
            Preset("llava-next", 5 * keep, {"keep": keep}, _PAPER + "; per tile, 5 tiles")
            for keep in (128, 64, 32)
        ),
    )

    important_ratio: Annotated[float, Range(0, 1)] = 0.5

    def choose(self, tiles: Tiles, keep: int) -> Tensor:
        pair = important_and_diverse(tiles.features, tiles.score, keep, self.important_ratio)
        return torch.cat(pair, dim=1)
