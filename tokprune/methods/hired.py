"""HiRED: a budget for every tile by the first layer's attention, its patches by a deep layer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from tokprune.engine.contracts import ImageTokens, Plan
from tokprune.engine.model import ImageLayout, ModelFacts
from tokprune.methods.base import Preset, check_fits
from tokprune.methods.cells import check_whole, index_of_cells
from tokprune.methods.options import Range
from tokprune.methods.registry import register_method
from tokprune.methods.scoring import PromptSelector, SelectorStage
from tokprune.methods.tower_attention import PatchAttention, read_layer
from tokprune.operators.budgets import proportional_budgets
from tokprune.operators.hired import (
    Rounding,
    band_regions,
    crop_budgets,
    crop_regions,
    split_budget,
)
from tokprune.operators.topk import segment_topk

_CODE = "HiRED, official code, scripts"
_PAPER = "HiRED, arXiv 2408.10945"
_TABLES = "budget of later tables, such as HiPrune's, where it is a share of 1/3, 2/9 or 1/9"


@register_method
@dataclass(frozen=True)
class HiRED(PromptSelector):
    """On tiled models the base tile gets a share of the image's budget, and the crops divide the
    rest by how much of the base tile's most attended patches, in the encoder's first layer, each of
    them shows. Every tile keeps the patches that are attended to most at the layer the model reads.
    Text-agnostic; newline tokens go.

    The attention is the class token's, mean over heads; in towers without one, which the published
    method does not know, what a patch receives from all patches. An image of one tile keeps its
    best patches; the frames of a video, and tiles of which nothing says where they lie in the
    image, share the budget by their size. Crops that the model shrinks to one map count as one.

    Patches of padding are no candidates (in the official code they are, and those kept are cut off
    afterwards).

    Args:
        keep: visual tokens per image (count), all its tiles together, or fraction of its patches.
        alpha: share of the base tile.
        budget_regions: "image": a crop's budget comes from the part of the base tile that shows
            what it shows (ours); "bands": from one of as many equal, consecutive pieces of the
            base tile's raster, in order, as in the official code.
        rounding: "remainder" spends the whole budget (ours); "floor" loses the remainders, up to a
            token for each crop, and what a crop cannot hold, as the official code does.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.

    Source: "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution
    Vision-Language Models", AAAI 2025, arXiv 2408.10945.
    """

    name = "hired"
    needs = "class-token attention of two encoder layers"
    paper = "arXiv 2408.10945"
    adaptive = "with rounding='floor'"
    without_class_token = "the mean attention that a patch receives stands in for the class token's"
    presets = (
        Preset("llava-next", 0.2, {"keep": 0.2}, _CODE),
        *(Preset("llava-next", keep, {"keep": keep}, _PAPER) for keep in (0.1, 0.4)),
        *(Preset("llava-1.5", keep, {"keep": keep}, _TABLES) for keep in (192, 128, 64)),
    )

    alpha: Annotated[float, Range(0, 1)] = 0.5
    budget_regions: Literal["image", "bands"] = "image"
    rounding: Rounding = "remainder"

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        tower = facts.need_tower(self.name, whole=False)
        layers = (0, read_layer(tower)) if tower.tiled else (read_layer(tower),)
        return Plan(encoder=(PatchAttention(*layers),), prompt=(SelectorStage(self),))

    def fixed_count(self, facts: ModelFacts, layout: ImageLayout) -> int | None:
        if self.rounding == "floor" and layout.tiles > 1:
            return None
        return super().fixed_count(facts, layout)

    def select(self, image: ImageTokens, keep: int) -> Tensor:
        check_whole(image, self.name)
        assert image.metric is not None
        budgets = self.budgets(image, keep)
        deep = image.metric[None, :, -1]
        kept = segment_topk(deep, image.tile.masked_fill(image.row < 0, -1)[None], budgets)[0]
        if self.rounding == "floor":
            return kept.nonzero()[:, 0]
        return (~kept).to(torch.int8).sort(stable=True).indices[:keep]

    def budgets(self, image: ImageTokens, keep: int) -> Tensor:
        """Tokens that each tile keeps, [1, tiles] long."""
        windows, device = image.windows(), image.features.device
        sizes = [(bottom - top) * (right - left) for top, bottom, left, right in windows]
        crops = len(sizes) - 1
        if not crops or image.video or image.tile_grid == (0, 0):
            return proportional_budgets(torch.tensor([sizes]), keep).to(device, non_blocking=True)
        assert image.metric is not None
        own, rest = split_budget(keep, self.alpha, sizes[0], sum(sizes[1:]))
        if self.rounding == "remainder":
            own = keep - rest
        if crops == 1 or self.budget_regions == "bands":
            region = band_regions(sizes[0], crops)
        else:
            region = crop_regions(image.tile_grids()[0], image.tile_grid, windows[1:])
        first = image.metric[index_of_cells(image)[: sizes[0]], 0]
        more = crop_budgets(first[None], region, sizes[1:], rest, self.alpha, self.rounding)
        return torch.cat([torch.full_like(more[:, :1], own), more], dim=1)
