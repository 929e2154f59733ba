"""SCOPE: patches that many others resemble, weighted by the class token's attention, greedily."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from tokprune.engine.contracts import Attention, TowerTokens
from tokprune.methods.base import Preset
from tokprune.methods.options import Range
from tokprune.methods.registry import register_method
from tokprune.methods.tile_selector import Tiles, TileSelector
from tokprune.operators.coverage import Combine, coverage

_CODE = "scripts of SCOPE's official code: alpha 1, gain times saliency"
_TABLES = "budget of TOPS's tables; " + _CODE


@register_method
@dataclass(frozen=True)
class SCOPE(TileSelector):
    """Of every tile, one patch after another is kept: the one whose cosine similarity covers most
    of what the kept ones do not yet cover, times its saliency, the class token's attention at the
    layer the model reads, summed over heads. Text-agnostic.

    Every image has its own budget, whatever else is in the batch; the official code divides one
    among all images of a call. With ``scope="image"`` it is shared by the tiles that the image
    makes, as published for tiled models. Gains are float32: in half precision late ones tie.

    Args:
        keep: tokens of each tile (count), or fraction of its patches.
        alpha: exponent of the saliency, at least 0; 0 is coverage alone.
        combine: "multi" multiplies the gain and saliency ** alpha, "add" adds them.
        score: "cls", or "mean_received" (ours): the mean attention that a patch receives from all
            others, which "cls" means as well where the tower has no class token.
        order: on tiled models: "spatial" chooses among the patches that show the image, which alone
            are to be covered; "published" has padding among both, as the official code does.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image", whose tiles then share it.

    Source: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs",
    NeurIPS 2025, arXiv 2510.24214.
    """

    name = "scope"
    needs: ClassVar[str] = "class-token attention and features of one layer"
    paper = "arXiv 2510.24214"
    presets = (
        *(Preset("llava-1.5", keep, {"keep": keep}, _CODE) for keep in (192, 128, 64)),
        Preset("llava-1.5", 32, {"keep": 32}, _TABLES),
        *(
            Preset("llava-next", keep, {"keep": keep, "scope": "image"}, _CODE)
            for keep in (640, 320, 160)
        ),
    )

    alpha: Annotated[float, Range(0)] = 1.0
    combine: Combine = "multi"

    def look(self, attention: Attention, tokens: TowerTokens) -> Tensor:
        if tokens.has_cls and self.score == "cls":
            return attention.cls_row().sum(1)[:, 1:]
        return super().look(attention, tokens)

    def choose(self, tiles: Tiles, keep: int) -> Tensor:
        return coverage(tiles.features, keep, tiles.score, self.alpha, self.combine)
