"""PruneSID: patches grouped by principal components, look-alikes of a group left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokprune.engine.contracts import Attention, Order, Plan, TowerTokens
from tokprune.engine.model import ImageLayout, ModelFacts
from tokprune.methods.base import Preset, check_fits
from tokprune.methods.options import Seed
from tokprune.methods.prunesid.tower import GroupStage
from tokprune.methods.registry import register_method
from tokprune.methods.tile_selector import TileChooser, Tiles
from tokprune.methods.tile_stages import AtInput
from tokprune.operators.prunesid import group_choice, principal_groups

_CODE = "ZhengyaoFang/PruneSID; its randomised components cannot be repeated exactly"
_RERUN = "budget of Cen-Prune's tables; " + _CODE


@register_method
@dataclass(frozen=True)
class PruneSID(TileChooser):
    """Of every tile at the layer the model reads, a principal component for every four tokens of
    the budget; each patch belongs to the component it loads on most. In every group the patch of
    the highest importance is picked and look-alikes of it are put off, and so on; groups share the
    budget in proportion to their picks. Text-agnostic.

    The class token is one of the ``keep`` tokens and enters the language model, where the tower has
    one. On tiled models every tile is a budget of its own and padding competes, as published; the
    tokens of the base tile enter first, then the patches of all crops in raster order of the
    stitched image, then the crops' class tokens; newline tokens go.

    Where the model makes one token of several patches, and for videos whose frames are pooled,
    tokens are chosen at the language-model input, as the authors do for Qwen2-VL: without a class
    token, by loading, with their threshold, and in prompt order.

    Args:
        keep: tokens of each tile (count), class token included, or fraction of its patches.
        importance: "cls", the class token's attention, summed over heads, as in the official code
            for LLaVA; "loading", the size of a patch's loading on its component, as in that for
            Qwen2-VL, which "cls" means as well where the tower has no class token.
        pca: "exact", in float64; "random", a randomised decomposition of a few iterations, as in
            the official code, which leaves its seed open: two of its runs keep different patches.
        seed: of "random", the same draw for every tile.
        keep_cls: whether the class token is one of the tokens.
        order: "published": the class token, then group after group; "spatial": by place, the class
            token last.
        crop_order: of crops: "spatial" puts each patch in its own place; "published" puts the
            patches in group order into the places of those kept, as the official code does.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image" to share it between the
            most tiles that an image can have.

    Source: "Prune Redundancy, Preserve Essence" (PruneSID), ICLR 2026, arXiv 2603.09480.
    """

    name = "prunesid"
    needs: ClassVar[str] = "class-token attention and features of one layer"
    paper = "arXiv 2603.09480"
    without_class_token = "the size of a patch's loading stands in for the class token's attention"
    presets = (
        *(Preset("llava-1.5", keep, {"keep": keep}, _CODE) for keep in (192, 128, 64)),
        Preset("llava-1.5", 32, {"keep": 32}, _RERUN),
        *(
            Preset("llava-next", 5 * keep, {"keep": keep}, _CODE + "; per tile, 5 tiles")
            for keep in (128, 64, 32)
        ),
    )

    order: Order = "published"
    importance: Literal["cls", "loading"] = "cls"
    pca: Literal["exact", "random"] = "exact"
    seed: Seed = 0
    keep_cls: bool = True
    crop_order: Order = "spatial"

    @property
    def stochastic(self) -> bool:
        return self.pca == "random"

    def look(self, attention: Attention, tokens: TowerTokens) -> Tensor:
        return attention.cls_row().sum(1)[:, tokens.first_patch :]

    def choose(self, tiles: Tiles, keep: int) -> Tensor:
        n = tiles.cells.shape[1]
        # published as 18 T/n, at least 1, times a mean that counts each pair once among all n²
        scale = max(18 * keep / n, 1.0) * (n - 1) / (2 * n)
        return self.grouped(tiles.features, None, keep, keep, scale)

    def grouped(
        self, x: Tensor, score: Tensor | None, keep: int, total: int, scale: float | None = None
    ) -> Tensor:
        """Patches [B, keep] of features [B, N, C], group after group (see
        :func:`tokprune.operators.prunesid.group_choice`); ``score`` [B, N], None: the loadings."""
        generator = None if self.pca == "exact" else torch.Generator().manual_seed(self.seed)
        groups = min(max(1, total // 4), *x.shape[1:])
        group, loading = principal_groups(x, groups, generator)
        score = loading if score is None else score
        return group_choice(x, group, score, groups, keep, total, scale)

    def fixed_count(self, facts: ModelFacts, layout: ImageLayout) -> int | None:
        tower = facts.tower
        if tower is None or self.anchors is not None:
            return self._count_at_input(facts, layout)
        count = self.tile_budget(facts)
        if count == tower.patches:
            return layout.count
        extra = tower.cls_in_features and not self.keep_cls
        return layout.tiles * (count + int(extra))

    def plan(self, facts: ModelFacts) -> Plan:
        assert self.keep is not None
        if facts.tower is None or self.anchors is not None:
            check_fits(self.keep, facts)
            return Plan(prompt=(AtInput(self),))
        tower = facts.need_tower(self.name)
        pooled = facts.frame_grid is not None
        count = self.tile_budget(facts)
        stills = () if count == tower.patches else (GroupStage(self, tower, count, pooled),)
        return Plan(encoder=stills, prompt=(AtInput(self, videos_only=True),) if pooled else ())
