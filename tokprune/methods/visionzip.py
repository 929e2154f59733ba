"""VisionZip: keep the patches the class token attends to, merge the rest into a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ModelFacts,
    Order,
    Plan,
    Positions,
    Reduction,
    TowerInput,
    TowerTokens,
)
from tokprune.methods.base import (
    Budget,
    Method,
    Preset,
    check_choice,
    check_keep,
    register_method,
)
from tokprune.methods.merge_stage import Scope, check_one, last_merging_layer, tile_budget
from tokprune.operators.anyres import raster_position
from tokprune.operators.visionzip import Score, compress

_README = "VisionZip README"
_PAPER = "VisionZip, arXiv 2412.04467, tables; the split 27:5 as recalled from the paper"


def _preset(model: str, budget: int, dominant: int, contextual: int, source: str) -> Preset:
    return Preset(model, budget, {"dominant": dominant, "contextual": contextual}, source)


@register_method
@dataclass(frozen=True)
class VisionZip(Method):
    """At the layer the model reads, keep the patches that the class token attends to most
    (dominant), and merge all others by similarity of their keys into evenly spaced ones
    (contextual). The class token itself is one of the dominant tokens and enters the language
    model. Text-agnostic.

    On tiled models every tile, base included, is compressed alone and with the same numbers.
    Published order there: the base tile's tokens, the kept patches of all crops in raster order
    of the stitched picture, the crops' class tokens, their contextual tokens. Kept patches on
    padding stay, newline tokens go.

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

    name: ClassVar[str] = "visionzip"
    stages: ClassVar[tuple[str, ...]] = ("encoder, feature layer",)
    needs: ClassVar[str] = "class-token attention row and keys of one layer"
    paper: ClassVar[str] = "arXiv 2412.04467"
    presets: ClassVar[tuple[Preset, ...]] = (
        _preset("llava-1.5", 192, 162, 30, _PAPER),
        _preset("llava-1.5", 128, 108, 20, _PAPER),
        _preset("llava-1.5", 64, 54, 10, _README),
        _preset("llava-next", 640, 108, 20, _PAPER + "; per tile, 5 tiles"),
        _preset("llava-next", 320, 54, 10, _PAPER + "; per tile, 5 tiles"),
        _preset("llava-next", 160, 27, 5, _PAPER + "; per tile, 5 tiles"),
    )

    keep: Budget | None = None
    dominant: int | None = None
    contextual: int | None = None
    score: Score = "cls"
    order: Order = "published"
    positions: Positions = "compact"
    scope: Scope = "tile"

    def __post_init__(self) -> None:
        check_one(keep=self.keep, dominant=self.dominant)
        if self.keep is not None:
            check_keep(self.keep)
        if (self.contextual is None) != (self.dominant is None):
            raise ValueError(
                f"dominant={self.dominant} and contextual={self.contextual} should be given "
                "together"
            )
        for name, least in (("dominant", 1), ("contextual", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (not whole or value < least):
                raise ValueError(f"{name}={value!r} should be a count of tokens, at least {least}")
        check_choice(self.score, "score", ("cls", "mean_received"))
        check_choice(self.order, "order", ("published", "spatial"))
        check_choice(self.positions, "positions", ("compact", "preserve"))
        check_choice(self.scope, "scope", ("tile", "image"))

    def split(self, facts: ModelFacts) -> tuple[int, int]:
        """Dominant and contextual tokens of each tile.

        Raises:
            ValueError: more than the tile has.
        """
        if self.keep is not None:
            total = tile_budget(self.keep, facts, self.scope)
            dominant = max(1, round(total * 27 / 32))
            return dominant, total - dominant
        assert self.dominant is not None
        assert self.contextual is not None
        rows = facts.patches + int(facts.has_cls)
        if self.dominant + self.contextual > rows:
            raise ValueError(
                f"dominant={self.dominant} and contextual={self.contextual} are more than the "
                f"{rows} tokens of a tile; their sum should be at most {rows}"
            )
        return self.dominant, self.contextual

    def plan(self, facts: ModelFacts) -> Plan:
        layer = last_merging_layer(facts, "VisionZip")
        dominant, contextual = self.split(facts)
        if self.keep is not None and dominant + contextual == facts.patches:
            return Plan()
        return Plan(encoder=(_VisionZipStage(self, layer, dominant, contextual),))


class _VisionZipStage(EncoderStage):
    def __init__(self, method: VisionZip, layer: int, dominant: int, contextual: int) -> None:
        self.score = method.score
        self.dominant, self.contextual = dominant, contextual
        self.taps = self.after_layers = frozenset({layer})
        self.order, self.positions = method.order, method.positions

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
        facts, stage = self.tower.facts, self.stage
        side, cls = facts.grid[0], int(facts.has_cls)
        rows = stage.dominant + stage.contextual
        slots = tokens.slots[:, tokens.rows - rows :]
        device = slots.device
        row = torch.arange(rows, device=device)
        block = (facts.max_tiles * max(rows, facts.patches)) + 1
        keys = []
        start = 0
        for tiles, (down, across) in zip(self.tower.tiles_per_image, self.tower.tile_grids):
            own = slots[start + 1 : start + tiles]
            start += tiles
            keys.append(row[None])
            if tiles == 1:
                continue
            by_tile = torch.arange(tiles - 1, device=device)[:, None] * rows + row
            patches = raster_position(own[:, cls : stage.dominant], (down, across), side)
            key = by_tile + block * torch.where(row < stage.dominant, 2, 3)
            key[:, cls : stage.dominant] = patches + block
            keys.append(key)
        return torch.cat(keys)
