"""Stage 1 of MustDrop, in the vision encoder: merged windows, and the protected key set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    Positions,
    PromptStage,
    Reduction,
    Selection,
    TowerFacts,
    TowerInput,
    TowerTokens,
)
from tokprune.errors import UnsupportedModelError
from tokprune.operators.mustdrop import key_mask, key_tokens
from tokprune.operators.windows import WindowMerge, spatial_merge, spatial_merge_fixed

if TYPE_CHECKING:
    from tokprune.methods.mustdrop import MustDrop


def merge_layer(method: MustDrop, facts: TowerFacts) -> int:
    """The encoder layer whose output is merged.

    Raises:
        UnsupportedModelError: no single layer's output becomes the features.
        ValueError: layer, window or number of tokens do not fit the model.
    """
    last = facts.feature_layer
    if last is None or last < 0:
        raise UnsupportedModelError(
            "MustDrop merges after an encoder layer, but this model reads its features from "
            "several layers or before the first (config.vision_feature_layer); spatial=False "
            "leaves the encoder alone"
        )
    layer = method.merge_after_layer
    if layer is None:
        layer = last if method.variant == "lightcompress" else 0
    if not 0 <= layer <= last:
        raise ValueError(
            f"merge_after_layer={layer} should be in [0, {last}]: the model reads its features "
            f"after layer {last}"
        )
    (h, w), (a, b) = facts.grid, method.window
    if h % a or w % b:
        raise ValueError(
            f"window={method.window} should divide the grid of {h} × {w} patches of this model"
        )
    if method.retained is not None:
        rows = h * w + facts.has_cls
        least = max(1, rows - (h * w // (a * b) + 1) * (a * b - 1) + 1)
        if not least <= method.retained <= rows:
            raise ValueError(
                f"retained={method.retained} cannot be reached with windows of {method.window}: it "
                f"should be in [{least}, {rows}]"
            )
    return layer


def key_layer(method: MustDrop, facts: TowerFacts, merged: int | None) -> int:
    """The encoder layer whose attention ranks the key tokens, after the merge in layer ``merged``.

    Raises:
        ValueError: there is no such layer.
    """
    depth = facts.encoder_layers
    layer = method.key_layer + depth if method.key_layer < 0 else method.key_layer
    first = 0 if merged is None else merged + 1
    if not first <= layer < depth:
        raise ValueError(
            f"key_layer={method.key_layer} should be in [{first}, {depth - 1}]"
            + ("" if merged is None else f", after the merge in layer {merged}")
        )
    return layer


class MergeStage(EncoderStage):
    def __init__(
        self, method: MustDrop, facts: TowerFacts, merged: int | None, keys: int | None
    ) -> None:
        self.method = method
        #: the port drops instead of merging on tiled models
        self.only_mark = method.variant == "lightcompress" and facts.tiled
        self.after_layers = frozenset() if merged is None else frozenset({merged})
        self.taps = frozenset() if keys is None else frozenset({keys})
        self.order, self.positions = method.order, method.new_positions
        if merged is not None and method.retained is None:
            self.across = "call" if method.share_r == "batch" else "image"

    def start(self, tower: TowerInput) -> EncoderRun:
        return MergeRun(self, tower)


class MergeRun(EncoderRun):
    def __init__(self, stage: MergeStage, tower: TowerInput) -> None:
        self.stage, self.tower = stage, tower
        #: what merged, and key tokens [tiles, k] by falling score (−1 = padding)
        self.merge: WindowMerge | None = None
        self.keys: Tensor | None = None

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        self.merge = merge = self._merge(hidden, tokens.has_cls)
        first = tokens.first_patch
        if self.stage.only_mark:
            return None
        if min(merge.counts) == hidden.shape[1] and not self.tower.facts.tiled:
            return None  # nothing merged anywhere; tiled models are packed anew all the same
        rows = torch.where(merge.rows < 0, -1, merge.rows + first)
        group = merge.group + first
        if first:
            zero = torch.zeros_like(rows[:, :1])
            rows, group = torch.cat([zero, rows], dim=1), torch.cat([zero, group], dim=1)
        ragged = min(merge.counts) < max(merge.counts)
        return Reduction(rows, merge.out, group, merge.counts if ragged else None)

    def _merge(self, hidden: Tensor, has_cls: bool) -> WindowMerge:
        method, grid = self.stage.method, self.tower.facts.grid
        window = (method.window[0], method.window[1])
        if method.retained is not None:
            return spatial_merge_fixed(hidden, window, method.retained, has_cls, grid)
        share: Literal["batch"] | Tensor = "batch"
        if method.share_r == "image":
            share = torch.tensor(self.tower.image_of_tile, device=hidden.device)
        return spatial_merge(hidden, method.threshold, window, has_cls, share, grid)

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        if tokens.has_cls:
            row = attention.cls_row()
        else:
            row = torch.nn.functional.pad(attention.received(), (1, 0))[:, None]
        if self.tower.facts.merges > 1:
            cells = self.tower.by_cell(row[:, :, 1:].mean(1))
            row = torch.nn.functional.pad(cells, (1, 0))[:, None]
        self.keys = key_tokens(row, self.stage.method.key_rate, tokens.patch_valid)

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        tag = None
        if self.stage.only_mark:
            assert self.merge is not None
            tag = key_mask(self.merge.rows, self.tower.facts.patches)
        elif self.keys is not None:
            tag = key_mask(self.keys, tokens.rows - tokens.first_patch)
        return EncoderOutcome(tag=tag, unpad=False)


class KeepTagged(PromptStage):
    """Drops the patches without a mark; newline and class tokens stay. One read per image."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        answers: list[Selection | None] = []
        for image in images:
            assert image.tag is not None
            answers.append(Selection((image.tag | (image.row < 0)).nonzero().view(-1)))
        return answers
