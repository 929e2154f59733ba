"""FlowCut inside the vision tower: scores averaged over layers, cuts paced by entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    Reduction,
    TowerFacts,
    TowerInput,
    TowerTokens,
)
from tokprune.errors import UnsupportedModelError
from tokprune.methods.base import resolve_keep
from tokprune.methods.tower_rows import behind_class_token, stitched_places
from tokprune.operators.flow import (
    FlowKeep,
    Reduce,
    accumulate,
    attn_terms,
    encoder_keep,
    flow_score,
    global_query_terms,
)
from tokprune.operators.topk import keep_topk

if TYPE_CHECKING:
    from tokprune.methods.flowcut import FlowCut

#: towers without a class token (official code for Qwen2-VL): the entropy is taken of the row as
#: it is, with this inside the logarithm
_GLOBAL_EPS = 1e-7


def last_cut(facts: TowerFacts) -> int:
    """The layer of the cut down to the budget: one more runs before the features are read.

    Raises:
        UnsupportedModelError: there is none, or the features come from several layers.
    """
    if facts.feature_layer is None:
        raise UnsupportedModelError(
            "FlowCut drops tokens from layer to layer, but this model concatenates the features of "
            "several encoder layers (config.vision_feature_layer)"
        )
    if facts.feature_layer < 1:
        raise UnsupportedModelError(
            "FlowCut needs two encoder layers before the features are read, but this model reads "
            f"them after layer {facts.feature_layer} (config.vision_feature_layer)"
        )
    return facts.feature_layer - 1


class TowerStage(EncoderStage):
    def __init__(self, method: FlowCut, patches: int, last: int) -> None:
        self.method, self.patches, self.last = method, patches, last
        self.taps = frozenset(range(last + 1))
        self.between_layers = frozenset(range(last, -1, -method.period))
        self.order, self.positions = method.order, method.new_positions
        if method.entropy is None:
            self.across = "call" if method.count_reduce == "batch" else "image"

    def start(self, tower: TowerInput) -> EncoderRun:
        return TowerRun(self, tower, self.patches)


class PackedStage(TowerStage):
    """The same in an encoder that packs its images: every frame by itself, down to twice its share
    of the budget; the last block is the last cut."""

    packs = True

    def __init__(self, method: FlowCut, last: int) -> None:
        super().__init__(method, 0, last)
        self.after_layers, self.between_layers = self.between_layers, frozenset()
        self.across = "tile"

    def start(self, tower: TowerInput) -> EncoderRun:
        area = tower.facts.merges**2
        tokens = tower.facts.tokens_per_tile // area * tower.frames
        wanted = max(1, 2 * resolve_keep(self.method.keep, tokens) // tower.frames)
        return TowerRun(self, tower, area * wanted)


class TowerRun(EncoderRun):
    def __init__(self, stage: TowerStage, tower: TowerInput, patches: int) -> None:
        self.stage, self.tower, self.patches = stage, tower, patches
        #: attention row of this layer and average of scores so far, [B, patches alive]
        self.row: Tensor | None = None
        self.average: Tensor | None = None
        self.reduce: Reduce | Tensor = "batch"
        if stage.method.count_reduce == "image":
            self.reduce = torch.tensor(tower.image_of_tile, device=tower.device)

    def _done(self, tokens: TowerTokens) -> bool:
        return max(tokens.counts) - tokens.first_patch <= self.patches

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        if self._done(tokens):
            return
        method = self.stage.method
        q, k, v, scale = attention.query, attention.key, attention.value, attention.scaling
        if tokens.has_cls:
            terms = attn_terms(
                q[:, :, :1], k, v, scale, method.semantic, method.value_norm, attention.valid
            )
            self.row, score = terms.attention, flow_score(*terms)
        else:
            self.row, value = global_query_terms(q, k, v, scale, attention.valid)
            score = flow_score(self.row, None, value, renormalize=False)
        average = None if self.average is None else self.average.to(score.device)
        self.average = accumulate(average, score, method.ema)

    def between(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        if self._done(tokens):
            return None
        keep = self._keep(self.stage.last - layer, tokens)
        if keep is None:
            return None
        assert self.average is not None
        self.average = self.average.gather(1, keep.index.clamp(min=0))
        ragged = min(keep.counts) < max(keep.counts)
        patches = Reduction(keep.index.to(hidden.device), counts=keep.counts if ragged else None)
        return behind_class_token(hidden, tokens.first_patch, patches)

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        return self.between(layer, hidden, tokens)

    def _keep(self, remaining: int, tokens: TowerTokens) -> FlowKeep | None:
        method, target = self.stage.method, self.patches
        score, row, valid = self.average, self.row, tokens.patch_valid
        assert score is not None
        assert row is not None
        n = target
        if remaining and method.entropy is None:
            reduce = self.reduce
            return encoder_keep(
                score, row, remaining, target, valid,
                reduce.to(row.device) if isinstance(reduce, Tensor) else reduce, method.period,
                renormalize=tokens.has_cls, eps=0.0 if tokens.has_cls else _GLOBAL_EPS,
            )  # fmt: skip
        if remaining:
            assert method.entropy is not None
            alive = score.shape[1]
            dropped = round((alive - target) / remaining**0.5 * (1 - method.entropy**2))
            n = max(alive - dropped, target)
        # every tile has at least n patches left: nothing to read back
        if valid is not None:
            score = score.masked_fill(~valid, -torch.inf)
        return FlowKeep(keep_topk(score, n), [n] * score.shape[0])

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return EncoderOutcome(key=self._packing(tokens) if self.tower.facts.tiled else None)

    def _packing(self, tokens: TowerTokens) -> Tensor:
        """Sort keys of the published packing: base tile, then all crops in raster order. The
        class tokens, where the model keeps them, come before all (no published place)."""
        facts = self.tower.facts
        slots = tokens.slots[:, tokens.first_patch :]
        keys = [
            torch.cat([base, facts.patches + places])
            for base, places in stitched_places(slots, self.tower)
        ]
        key = torch.cat(keys)
        if facts.cls_in_features:
            tile = torch.arange(-len(key), 0, device=key.device)
            key = torch.cat([tile[:, None], key], dim=1)
        return key
