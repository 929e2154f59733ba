"""VisionZip: keep the patches the class token attends to, merge the rest into a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    Plan,
    Reduction,
    TowerInput,
    TowerTokens,
)
from tokprune.engine.model import ImageLayout, ModelFacts
from tokprune.methods.base import Preset, check_fits, resolve_keep
from tokprune.methods.options import AtLeast
from tokprune.methods.registry import register_method
from tokprune.methods.tiles import TileMethod, feature_layer, tiles_of
from tokprune.methods.tower_rows import stitched_places
from tokprune.methods.visionzip_cells import CellStage, KeysAndAttention
from tokprune.operators.visionzip import Score, compress

_README = "VisionZip README"
_PAPER = "VisionZip, arXiv 2412.04467, tables; the split 27:5 as recalled from the paper"


def _preset(model: str, budget: int, dominant: int, contextual: int, source: str) -> Preset:
    return Preset(model, budget, {"dominant": dominant, "contextual": contextual}, source)


@register_method
@dataclass(frozen=True)
class VisionZip(TileMethod):
    """At the layer the model reads, keep the patches that the class token attends to most
    (dominant), and merge all others by similarity of their keys into evenly spaced ones
    (contextual). The class token itself is one of the dominant tokens and enters the language
    model. Text-agnostic.

    On tiled models every tile, base included, is compressed alone and with the same numbers.
    Published order there: the base tile's tokens, the kept patches of all crops in raster order
    of the stitched image, the crops' class tokens, their contextual tokens. Kept patches on
    padding stay, newline tokens go.

    On models that merge patches after the tower, its last layer is looked at, attention and keys
    are averaged over the patches of a token, and tokens are kept and merged at the language-model
    input, tile by tile or frame by frame; there is no class token among them.

    Args:
        keep: tokens of each tile (count) or fraction; 27/32 of them, rounded, are dominant. Give
            ``keep``, or ``dominant`` and ``contextual``.
        dominant: dominant tokens of each tile, class token included.
        contextual: merged tokens of each tile (0: what is not dominant is dropped).
        score: "cls" ranks by the class token's attention; "mean_received" by the mean attention
            that a token receives from all others (the paper's rule for towers without a class
            token, where "cls" means this as well).
        order: of the tokens in the prompt: "published" (dominant by position, then contextual)
            or "spatial".
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image" to share it between the
            most tiles that an image can have.

    Source: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language
    Models", CVPR 2025, arXiv 2412.04467.
    """

    name = "visionzip"
    stages = ("encoder, feature layer",)
    needs = "class-token attention row and keys of one layer"
    paper = "arXiv 2412.04467"
    without_class_token = "the mean attention that a token receives stands in for the class token's"
    without_tower_rows = "keeps and merges at the language-model input, not at the feature layer"
    presets = (
        _preset("llava-1.5", 192, 162, 30, _PAPER),
        _preset("llava-1.5", 128, 108, 20, _PAPER),
        _preset("llava-1.5", 64, 54, 10, _README),
        _preset("llava-next", 640, 108, 20, _PAPER + "; per tile, 5 tiles"),
        _preset("llava-next", 320, 54, 10, _PAPER + "; per tile, 5 tiles"),
        _preset("llava-next", 160, 27, 5, _PAPER + "; per tile, 5 tiles"),
    )

    one_of = ("keep", "dominant")
    budget_options = frozenset({"keep", "dominant", "contextual"})

    dominant: Annotated[int, AtLeast(1)] | None = None
    contextual: Annotated[int, AtLeast(0)] | None = None
    score: Score = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.contextual is None) != (self.dominant is None):
            raise ValueError(
                f"dominant={self.dominant} and contextual={self.contextual} should be given "
                "together"
            )

    def split(self, facts: ModelFacts) -> tuple[int, int]:
        """Dominant and contextual tokens of each tile.

        Raises:
            ValueError: more than the tile has.
        """
        if self.keep is not None:
            total = self.tile_budget(facts)
            dominant = max(1, round(total * 27 / 32))
            return dominant, total - dominant
        assert self.dominant is not None
        assert self.contextual is not None
        tower = facts.need_tower(self.name)
        rows = tower.patches + int(tower.has_cls)
        if self.dominant + self.contextual > rows:
            raise ValueError(
                f"dominant={self.dominant} and contextual={self.contextual} are more than the "
                f"{rows} tokens of a tile; their sum should be at most {rows}"
            )
        return self.dominant, self.contextual

    def split_of(self, tokens: int, tiles: int) -> tuple[int, int]:
        """Dominant and contextual tokens of each of ``tiles`` tiles of ``tokens`` tokens, on models
        whose images have grids of their own."""
        if self.keep is None:
            assert self.dominant is not None
            assert self.contextual is not None
            dominant = min(self.dominant, tokens)
            return dominant, min(self.contextual, tokens - dominant)
        total = resolve_keep(self.keep, tokens)
        if self.scope == "image" and isinstance(self.keep, int):
            total = min(tokens, max(1, self.keep // tiles))
        dominant = max(1, round(total * 27 / 32))
        return dominant, total - dominant

    def fixed_count(self, facts: ModelFacts, layout: ImageLayout) -> int | None:
        if facts.tower is None:
            sizes = [size for size, _ in tiles_of(facts, layout)]
            left = sum(min(size, sum(self.split_of(size, len(sizes)))) for size in sizes)
            return left if len(set(sizes)) == 1 else None
        left = sum(self.split(facts))
        whole = self.keep is not None and left == facts.tower.patches
        return layout.count if whole else left * layout.tiles

    def plan(self, facts: ModelFacts) -> Plan:
        tower = facts.need_tower(self.name, whole=False)
        if facts.tower is None:
            if self.keep is not None:
                check_fits(self.keep, facts)
            layer = feature_layer(tower, "VisionZip")
            observe = KeysAndAttention(layer, self.score)
            return Plan(encoder=(observe,), prompt=(CellStage(self),))
        layer = feature_layer(tower, "VisionZip")
        dominant, contextual = self.split(facts)
        if self.keep is not None and dominant + contextual == tower.patches:
            return Plan()
        return Plan(encoder=(_VisionZipStage(self, layer, dominant, contextual),))


class _VisionZipStage(EncoderStage):
    def __init__(self, method: VisionZip, layer: int, dominant: int, contextual: int) -> None:
        self.score = method.score
        self.dominant, self.contextual = dominant, contextual
        self.taps = self.after_layers = frozenset({layer})
        self.order, self.positions = method.order, method.new_positions

    def start(self, tower: TowerInput) -> EncoderRun:
        return _VisionZipRun(self, tower)


class _VisionZipRun(EncoderRun):
    def __init__(self, stage: _VisionZipStage, tower: TowerInput) -> None:
        self.stage, self.tower = stage, tower
        self.score: Tensor | None = None
        self.metric: Tensor | None = None

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        if tokens.has_cls and self.stage.score == "cls":
            self.score = attention.cls_row().sum(1)
        else:
            self.score = attention.received(others_only=True)
        self.metric = attention.key.float().mean(1)

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        stage = self.stage
        assert self.score is not None
        assert self.metric is not None
        new = compress(
            hidden, self.metric, self.score, stage.dominant, stage.contextual,
            class_token=tokens.has_cls,
        )  # fmt: skip
        if not tokens.has_cls or self.tower.facts.cls_in_features:
            return Reduction(new.rows, new.out, new.group)
        # The model cuts row 0 off, and the class token is to reach it: give it a copy.
        return Reduction(
            rows=torch.cat([new.rows[:, :1], new.rows], dim=1),
            hidden=torch.cat([new.out[:, :1], new.out], dim=1),
            group=torch.where(new.group < 0, -1, new.group + 1),
        )

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        if not self.tower.facts.tiled:
            return EncoderOutcome(unpad=False)
        return EncoderOutcome(key=self._packing(tokens), unpad=False)

    def _packing(self, tokens: TowerTokens) -> Tensor:
        """Sort keys of the published packing: base tile, patches, class tokens, merged rows."""
        facts, dominant = self.tower.facts, self.stage.dominant
        cls, rows = int(facts.has_cls), dominant + self.stage.contextual
        row = torch.arange(rows, device=tokens.slots.device)
        block = (facts.max_tiles * max(rows, facts.patches)) + 1
        patches = tokens.slots[:, tokens.rows - rows :][:, cls:dominant]
        keys = []
        for base, places in stitched_places(patches, self.tower):
            tile = torch.arange(len(places), device=row.device)[:, None]
            key = tile * rows + row + block * torch.where(row < dominant, 2, 3)
            key[:, cls:dominant] = places + block
            keys += [row.expand(len(base), rows), key]
        return torch.cat(keys)
