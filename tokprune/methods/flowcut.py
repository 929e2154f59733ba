"""FlowCut: progressive pruning inside the vision tower, paced by the entropy of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    DecoderRun,
    DecoderStage,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    KeepDecision,
    ModelFacts,
    Order,
    Plan,
    Positions,
    Reduction,
    ScoringLayer,
    SequenceView,
    TowerInput,
    TowerTokens,
)
from tokprune.errors import UnsupportedModelError
from tokprune.methods.base import (
    Budget,
    Method,
    Preset,
    check_choice,
    check_fits,
    check_keep,
    check_range,
    register_method,
    resolve_keep,
)
from tokprune.operators.anyres import raster_position
from tokprune.operators.flow import (
    FlowKeep,
    Reduce,
    Semantic,
    ValueNorm,
    accumulate,
    attn_terms,
    encoder_keep,
    flow_score,
    global_query_terms,
    text_terms,
)
from tokprune.operators.topk import keep_topk, segment_topk

_TABLES = "FlowCut, arXiv 2505.19536, tables: T visual tokens"
_NEXT = _TABLES + "; int(T/2) per tile in the tower, T after decoder layer 1"

#: towers without a class token (official code for Qwen2-VL): the entropy is taken of the row as
#: it is, with this inside the logarithm
_GLOBAL_EPS = 1e-7


@register_method
@dataclass(frozen=True)
class FlowCut(Method):
    """Every tower layer scores the patches alive (attention of the class token plus similarity of
    its value, times the norm of theirs), scores are averaged over layers, and every second layer
    drops the lowest. How many depends on the entropy of the class token's attention; the last
    cut, one layer before the features are read, leaves exactly the budget.

    The cut is made between attention and MLP of its layer: the same numbers as at its end (the
    official place) for less work. Towers without a class token use the variant for Qwen2-VL: the
    mean query stands in for the class token, and there is no value similarity.

    Tiled models keep ``tower_keep`` of each tile and cut once more inside the decoder, where the
    last token of the prompt ranks the visual tokens of each image in the same way. Their prompt
    holds the base tile's patches, then those of all crops in raster order of the stitched
    picture; patches on padding and newline tokens go (the official code appends one newline to an
    image of a single tile, which does not occur here).

    With n > 1 images in a prompt each is ranked alone and has a budget of its own.

    Args:
        keep: final visual tokens per image T (count), or fraction: of the patches of the largest
            image the model takes for the tower, of the patches that are shown for the decoder.
        period: layers between cuts.
        ema: weight of the history in the average of scores.
        semantic: value similarity by softmaxed "dot" products (code) or by "cosine" (paper).
        value_norm: norm of the head "mean" of the values (code) or of all heads, "per_head".
            Both this and ``semantic`` have no meaning in a tower without class token.
        count_reduce: images drop their own number of patches ("image"; tiles of an image share
            the largest), or all images of a batch the largest number among them, as in the
            official code ("batch"; an image then depends on its batch mates).
        entropy: None measures it; a number in [0, 1] is used instead of it in every layer, which
            makes the schedule static.
        tower_keep: patches kept of each tile (count or fraction). None: T without decoder cut;
            with it int(T/2) of each tile of a tiled model, otherwise 2T.
        prune_layer: decoder layer, 0-based, after which the decoder cut is made.
        decoder_cut: None means on tiled models only.
        order: "published", or "spatial" (prompt order).
        positions: "compact" (official) or "preserve", for both stages.

    The class token counts as one of the tokens where the model keeps it. Each cut but the last of
    the tower costs one read by the host (how many go), none with ``entropy``; a tiled image one
    more (how many of its patches lie on padding).

    Source: Tong et al., "FlowCut: Rethinking Redundancy via Information Flow for Efficient
    Vision-Language Models", NeurIPS 2025, arXiv 2505.19536.
    """

    name: ClassVar[str] = "flowcut"
    stages: ClassVar[tuple[str, ...]] = ("encoder layers", "decoder prefill")
    needs: ClassVar[str] = "class rows and values of most encoder layers, one decoder row"
    paper: ClassVar[str] = "arXiv 2505.19536"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset("llava-1.5", 192, {"keep": 192}, _TABLES),
        Preset("llava-1.5", 128, {"keep": 128}, _TABLES),
        Preset("llava-1.5", 64, {"keep": 64}, _TABLES),
        Preset("llava-next", 640, {"keep": 640}, _NEXT),
        Preset("llava-next", 320, {"keep": 320}, _NEXT),
        Preset("llava-next", 160, {"keep": 160}, _NEXT),
    )

    keep: Budget
    period: int = 2
    ema: float = 0.5
    semantic: Semantic = "dot"
    value_norm: ValueNorm = "mean"
    count_reduce: Reduce = "image"
    entropy: float | None = None
    tower_keep: Budget | None = None
    prune_layer: int = 1
    decoder_cut: bool | None = None
    order: Order = "published"
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if isinstance(self.period, bool) or not isinstance(self.period, int) or self.period < 1:
            raise ValueError(f"period={self.period!r} should be a number of layers, at least 1")
        check_range(self.ema, "ema", 0, 1)
        check_choice(self.semantic, "semantic", ("dot", "cosine"))
        check_choice(self.value_norm, "value_norm", ("mean", "per_head"))
        check_choice(self.count_reduce, "count_reduce", ("image", "batch"))
        if self.entropy is not None:
            check_range(self.entropy, "entropy", 0, 1)
        if self.tower_keep is not None:
            check_keep(self.tower_keep, "tower_keep")
        if isinstance(self.prune_layer, bool) or not isinstance(self.prune_layer, int):
            raise ValueError(f"prune_layer={self.prune_layer!r} should be a layer number")
        if self.prune_layer < 0:
            raise ValueError(f"prune_layer={self.prune_layer} should be at least 0")
        check_choice(self.decoder_cut, "decoder_cut", (None, True, False))
        check_choice(self.order, "order", ("published", "spatial"))
        check_choice(self.positions, "positions", ("compact", "preserve"))

    def cuts_in_decoder(self, facts: ModelFacts) -> bool:
        return facts.tiled if self.decoder_cut is None else self.decoder_cut

    def tower_patches(self, facts: ModelFacts) -> int:
        """Patches that the tower keeps of each tile.

        Raises:
            ValueError: the budget is more than there is, or not one patch per tile.
        """
        cls = int(facts.cls_in_features)
        check_fits(self.keep, facts)
        if self.tower_keep is not None:
            check_fits(self.tower_keep, facts, facts.tokens_per_tile, "tower_keep")
            rows = resolve_keep(self.tower_keep, facts.tokens_per_tile)
        else:
            tiles = facts.max_tiles
            total = resolve_keep(self.keep, tiles * facts.tokens_per_tile)
            if not self.cuts_in_decoder(facts):
                rows = total // tiles
            else:
                rows = total // 2 if facts.tiled else 2 * total
        if rows - cls < 1:
            raise ValueError(
                f"keep={self.keep} leaves {rows} of the tokens of each tile inside the vision tower"
                + (", the class token among them" if cls else "")
                + f"; it should leave at least {1 + cls}"
            )
        return min(rows - cls, facts.patches)

    def plan(self, facts: ModelFacts) -> Plan:
        patches = self.tower_patches(facts)
        encoder: tuple[EncoderStage, ...] = ()
        if patches < facts.patches:
            encoder = (_FlowCutStage(self, patches, _last_cut(facts)),)
        decoder: tuple[DecoderStage, ...] = ()
        if self.cuts_in_decoder(facts) and self.keep != 1.0:
            if self.prune_layer + 1 >= facts.decoder_layers:
                raise ValueError(
                    f"prune_layer={self.prune_layer} should be at most {facts.decoder_layers - 2}: "
                    f"the model has {facts.decoder_layers} decoder layers and one must follow"
                )
            decoder = (_FlowCutDecoder(self, self._decoder_keep(facts, patches)),)
        return Plan(encoder=encoder, decoder=decoder)

    def _decoder_keep(self, facts: ModelFacts, patches: int) -> Budget:
        """The budget in terms of the tokens that enter the decoder: ``patches`` of each tile."""
        if isinstance(self.keep, int):
            return self.keep
        return min(1.0, self.keep * facts.tokens_per_tile / (patches + facts.cls_in_features))


def _last_cut(facts: ModelFacts) -> int:
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


# ------------------------------------------------------------------------------- tower


class _FlowCutStage(EncoderStage):
    def __init__(self, method: FlowCut, patches: int, last: int) -> None:
        self.method, self.patches, self.last = method, patches, last
        self.taps = frozenset(range(last + 1))
        self.between_layers = frozenset(range(last, -1, -method.period))
        self.order, self.positions = method.order, method.positions

    def start(self, tower: TowerInput) -> EncoderRun:
        return _FlowCutRun(self, tower)


class _FlowCutRun(EncoderRun):
    def __init__(self, stage: _FlowCutStage, tower: TowerInput) -> None:
        self.stage, self.tower = stage, tower
        #: attention row of this layer and average of scores so far, [B, patches alive]
        self.row: Tensor | None = None
        self.average: Tensor | None = None
        self.reduce: Reduce | Tensor = "batch"
        if stage.method.count_reduce == "image":
            self.reduce = torch.tensor(tower.image_of_tile, device=tower.device)

    def _done(self, tokens: TowerTokens) -> bool:
        return max(tokens.counts) - tokens.first_patch <= self.stage.patches

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
        first = tokens.first_patch
        rows = torch.where(keep.index < 0, -1, keep.index + first)
        if first:
            rows = torch.cat([torch.zeros_like(rows[:, :1]), rows], dim=1)
        ragged = min(keep.counts) < max(keep.counts)
        counts = [n + first for n in keep.counts] if ragged else None
        return Reduction(rows.to(hidden.device), counts=counts)

    def _keep(self, remaining: int, tokens: TowerTokens) -> FlowKeep | None:
        method, target = self.stage.method, self.stage.patches
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
        keys, start = [], 0
        for tiles, grid in zip(self.tower.tiles_per_image, self.tower.tile_grids):
            own = slots[start : start + tiles]
            start += tiles
            keys.append(own[:1])
            if tiles > 1:
                keys.append(facts.patches + raster_position(own[1:], grid, facts.grid[0]))
        key = torch.cat(keys)
        if facts.cls_in_features:
            tile = torch.arange(-len(key), 0, device=key.device)
            key = torch.cat([tile[:, None], key], dim=1)
        return key


# ------------------------------------------------------------------------------- decoder


class _FlowCutDecoder(DecoderStage):
    def __init__(self, method: FlowCut, keep: Budget) -> None:
        self.method, self.keep = method, keep
        self.taps = frozenset({method.prune_layer})
        self.prune_layers = frozenset({method.prune_layer + 1})

    def start(self) -> DecoderRun:
        return _FlowCutDecoderRun(self)


class _FlowCutDecoderRun(DecoderRun):
    def __init__(self, stage: _FlowCutDecoder) -> None:
        self.stage = stage
        #: [B, L] score of every visual token, 0 for text
        self.score: Tensor | None = None

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        if self._counts(sequence) == sequence.counts:
            return
        method, past = self.stage.method, attention.past
        key, value = attention.key[:, :, past:], attention.value[:, :, past:]
        last = sequence.last_row()
        q_row, v_row = _row(attention.query, last), _row(value, last)
        total = torch.zeros(sequence.column.shape, device=key.device)
        for image in range(sequence.segments):
            own = sequence.segment == image
            terms = text_terms(
                q_row, key, v_row, value, attention.scaling, method.semantic, method.value_norm, own
            )
            total = total + flow_score(*terms)
        self.score = total

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        if self.score is None:
            return None
        counts = self._counts(sequence)
        budget = torch.tensor([row + [0] * (sequence.segments - len(row)) for row in counts])
        mask = segment_topk(
            self.score.to(hidden.device),
            sequence.segment,
            budget.to(hidden.device, non_blocking=True),
        )
        return KeepDecision(mask, counts, self.stage.method.positions)

    def _counts(self, sequence: SequenceView) -> list[list[int]]:
        return [[resolve_keep(self.stage.keep, n) for n in row] for row in sequence.counts]


def _row(x: Tensor, index: Tensor) -> Tensor:
    """Row ``index`` [B, 1] of [B, H, L, d], as [B, H, 1, d]."""
    batch, heads, _, width = x.shape
    return x.gather(2, index[:, None, :, None].expand(batch, heads, 1, width))
