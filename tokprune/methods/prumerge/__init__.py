"""PruMerge and PruMerge+: keep patches of outlying [CLS] attention, merge their neighbours in."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from tokprune.engine.contracts import ModelFacts, Plan
from tokprune.engine.model import ImageLayout
from tokprune.methods.base import check_fits, resolve_keep
from tokprune.methods.options import AtLeast, Budget, Range
from tokprune.methods.prumerge.cells import CellStage
from tokprune.methods.prumerge.tower import ObserverStage, TowerStage
from tokprune.methods.registry import register_method
from tokprune.methods.tiles import TileMethod, feature_layer, tiles_of
from tokprune.operators.prumerge import adaptive, by_attention, repeated, spread
from tokprune.operators.visionzip import Score


@register_method
@dataclass(frozen=True)
class PruMerge(TileMethod):
    """Of every tile or frame, keep patches that the class token attends to most, add to each the
    attention-weighted features of its nearest neighbours in key space, and sum all others into one
    more token. Text-agnostic. How many is the image's own affair (as many as there are outliers,
    the default and the published way) or fixed by ``keep`` or ``ratio``; PruMerge+ (``plus``)
    adds a regular grid of patches.

    Attention and keys are those of the encoder's last layer, the channels taken for one head;
    features are those that the model reads, before the projector. Where the model makes one token
    of several patches, both are averaged over the patches of a token, attention is scaled to add
    up to 1 in each tile, and tokens are merged at the language-model input (ours). Newline tokens
    go. The published figures of the paper are after a tuning of the model with the method on.

    Args:
        keep: tokens of each tile (count) or fraction, the extra token included (ours: no code fixes
            a count so). With ``plus`` half of them, rounded up, are chosen by attention, the others
            evenly spaced over what is left. None: ``ratio``, or adaptive.
        ratio: share of a tile's patches that attention chooses, 1/8 in the training code; ``plus``
            adds as many evenly spaced ones, and the extra token comes on top.
        plus: PruMerge+.
        neighbours: patches that are added to each one that stays.
        ratio_scope: whose outliers are counted: "tile", each for itself; "call", those of all tiles
            of a call together, on which the result of an image then depends (official). Towers
            only.
        max_keep: of the adaptive mode, the most tokens of a tile (ours); above it attention and
            even spacing fill the budget, with a warning: the published grid takes all patches
            but one where more than a sixth of them are outliers.
        duplicates: with ``ratio`` and ``plus``: "none", or "official", whose grid repeats patches
            that attention has chosen.
        score: "cls", or "mean_received": the mean attention that a patch receives from all others
            (ours), which "cls" means as well where the tower has no class token.
        order: of a tile's tokens: "published" (by attention, the grid, the extra token) or
            "spatial"; the extra token then stands where the patch of most attention in it was.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image" to share it between the
            most tiles that an image can have.

    An image whose ``keep`` is all of its tokens is left alone. The adaptive mode costs one read by
    the host.

    Source: Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal
    Models", ICCV 2025, arXiv 2403.15388.
    """

    name = "prumerge"
    stages = ("encoder, before projector",)
    needs = "class-token query and keys of the last layer"
    paper = "arXiv 2403.15388"
    adaptive = "with neither keep nor ratio"
    without_class_token = "the mean attention that a patch receives stands in for the class token's"
    without_tower_rows = "merges at the language-model input, not at the feature layer"

    one_of = ()
    budget_options = frozenset({"keep", "ratio"})
    variants = ({"plus": True},)

    ratio: Annotated[float, Range(0, 1, low_open=True)] | None = None
    plus: bool = False
    neighbours: Annotated[int, AtLeast(1)] = 32
    ratio_scope: Literal["tile", "call"] = "tile"
    max_keep: Budget = 0.5
    duplicates: Literal["none", "official"] = "none"
    score: Score = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and self.ratio is not None:
            raise ValueError(
                f"keep={self.keep} and ratio={self.ratio} should not be given together"
            )

    def plan(self, facts: ModelFacts) -> Plan:
        tower = facts.need_tower(self.name, whole=False)
        layer = feature_layer(tower, self.name)
        observer = ObserverStage(self, tower)
        if facts.tower is None:
            if self.ratio_scope == "call":
                raise ValueError(
                    f"ratio_scope='call' is for towers of equal tiles; on {facts.family} it "
                    "should be 'tile'"
                )
            if self.keep is not None:
                check_fits(self.keep, facts)
            return Plan(encoder=(observer,), prompt=(CellStage(self),))
        stills: tuple[TowerStage, ...] = ()
        pools = facts.frame_grid is not None
        keep = None if self.keep is None else self.tile_budget(facts)
        if keep != tower.patches:
            stills = (TowerStage(self, tower, layer, keep, pools),)
        if not pools:
            return Plan(encoder=stills)
        return Plan(encoder=stills or (observer,), prompt=(CellStage(self, videos_only=True),))

    def budget(self, patches: int, tiles: int) -> int | None:
        """Tokens to leave of each of ``tiles`` tiles of an image; None: the tiles decide."""
        if self.keep is None:
            return None
        if self.scope == "image" and isinstance(self.keep, int):
            return min(patches, max(1, self.keep // tiles))
        return resolve_keep(self.keep, patches)

    def fixed_count(self, facts: ModelFacts, layout: ImageLayout) -> int | None:
        if self.keep is None:
            return None
        if facts.tower is None:
            sizes = [size for size, _ in tiles_of(facts, layout)]
            budgets = [self.budget(size, len(sizes)) or 0 for size in sizes]
            return layout.count if budgets == sizes else sum(budgets)
        left = self.tile_budget(facts)
        if left == facts.tower.patches:
            return layout.count
        return layout.tiles * (left + int(facts.tower.cls_in_features))

    def choose(self, attn: Tensor, keep: int | None) -> tuple[Tensor, list[int]]:
        """Patches of tiles [B, N], those that stay first, in output order; and how many do."""
        n = attn.shape[1]
        if keep is None and self.ratio is None:
            return self._adaptive(attn)
        if keep is None:
            assert self.ratio is not None
            best = min(n - 1, max(1, int(n * self.ratio)))
            if self.plus and self.duplicates == "official":
                order, count = repeated(attn, best, self.ratio, n - 1)
                return order, [min(count, n - 1)] * len(attn)
            count = min(n - 1, 2 * best) if self.plus else best
        else:
            count = keep - 1
            best = (count + 1) // 2 if self.plus else count
        order = spread(attn, best, count - best) if self.plus else by_attention(attn)
        return order, [count] * len(attn)

    def _adaptive(self, attn: Tensor) -> tuple[Tensor, list[int]]:
        found = adaptive(attn, self.plus, shared=self.ratio_scope == "call")
        n = attn.shape[1]
        most = min(n - 1, max(1, resolve_keep(self.max_keep, n) - 1))
        counts = [min(count, most) for count in found.counts]
        over = [tile for tile, count in enumerate(found.counts) if count > most]
        if over:
            warnings.warn(
                f"PruMerge: attention is so flat that {max(found.counts)} of the {n} patches of a "
                f"tile would stay; max_keep={self.max_keep} leaves {most} and the extra token",
                stacklevel=2,
            )
        for tile in over:
            best = min(found.best[tile], most)
            found.order[tile] = spread(attn[tile : tile + 1], best, most - best)[0]
        return found.order, counts
