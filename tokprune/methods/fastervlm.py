"""FasterVLM: keep the patches that the class token attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokprune.methods.base import Preset
from tokprune.methods.registry import register_method
from tokprune.methods.tile_selector import Tiles, TileSelector
from tokprune.operators.topk import keep_topk

_PAPER = "FasterVLM, arXiv 2412.01818v1: 50, 75, 90 and 95 % of 576 pruned"
_TABLES = "budget of later tables, such as AutoPrune's; no published setting beside it"


@register_method
@dataclass(frozen=True)
class FasterVLM(TileSelector):
    """Of every tile, keep the patches that the class token attends to most at the layer the model
    reads, mean over heads. Text-agnostic.

    On tiled models the tokens of the base tile enter first, then those of all crops in raster order
    of the stitched image; newline tokens go.

    Args:
        keep: tokens of each tile (count), or fraction of its patches.
        score: "cls", or "mean_received": the mean attention that a patch receives from all others
            (ours), which "cls" means as well where the tower has no class token.
        order: on tiled models: "spatial" chooses among the patches that show the image; "published"
            lets padding compete, as the official code does.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image", whose tiles then share it.

    Source: Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning:
    Make VLM Inference Faster", arXiv 2412.01818v1 (version 2 of that number is VisPruner).
    """

    name = "fastervlm"
    paper = "arXiv 2412.01818v1"
    presets = (
        *(Preset("llava-1.5", keep, {"keep": keep}, _PAPER) for keep in (288, 144, 58, 29)),
        *(Preset("llava-1.5", keep, {"keep": keep}, _TABLES) for keep in (192, 128, 64, 32)),
        *(
            Preset("llava-next", 5 * keep, {"keep": keep}, _TABLES + "; per tile, 5 tiles")
            for keep in (128, 64, 32)
        ),
    )

    def choose(self, tiles: Tiles, keep: int) -> Tensor:
        return keep_topk(tiles.score, keep)
