"""FlowCut: progressive pruning inside the vision tower, paced by the entropy of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from tokprune.engine.contracts import ModelFacts, Order, Plan, Positions, TowerFacts
from tokprune.methods.base import Method, Preset, check_fits, resolve_keep
from tokprune.methods.flowcut.decoder import DecoderCut
from tokprune.methods.flowcut.tower import PackedStage, TowerStage, last_cut
from tokprune.methods.options import AtLeast, Budget, Range, Renamed
from tokprune.methods.registry import register_method
from tokprune.operators.flow import Reduce, Semantic, ValueNorm

_TABLES = "FlowCut, arXiv 2505.19536, tables: T visual tokens"
_NEXT = _TABLES + "; int(T/2) per tile in the tower, T after decoder layer 1"


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
    image; patches on padding and newline tokens go (the official code appends one newline to an
    image of a single tile, which does not occur here).

    On Qwen2-VL every frame is cut by itself down to twice its share of the budget; four patches
    that are left make a token, in order, and take the first places of the image (official port);
    the decoder then cuts to the budget. Other encoders that merge patches are refused.

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
        prune_before: decoder layer, 0-based, before which the decoder cut is made, by the attention
            of the layer before.
        decoder_cut: None means on tiled models only.
        order: "published", or "spatial" (prompt order).
        positions: "compact" (official) or "preserve", for both stages.

    The class token counts as one of the tokens where the model keeps it. Each cut but the last of
    the tower costs one read by the host (how many go), none with ``entropy``; a tiled image one
    more (how many of its patches lie on padding).

    Source: Tong et al., "FlowCut: Rethinking Redundancy via Information Flow for Efficient
    Vision-Language Models", NeurIPS 2025, arXiv 2505.19536.
    """

    name = "flowcut"
    stages = ("encoder layers", "decoder prefill")
    needs = "[CLS] attention and values of most encoder layers, one decoder row"
    paper = "arXiv 2505.19536"
    reads_prompt = "the cut inside the decoder"
    adaptive = "inside the encoder; what leaves it is fixed"
    without_class_token = "the mean query stands in for the class token's"
    without_tower_rows = (
        "tokens are made of patches that need not be neighbours, and take the first places"
    )
    presets = (
        Preset("llava-1.5", 192, {"keep": 192}, _TABLES),
        Preset("llava-1.5", 128, {"keep": 128}, _TABLES),
        Preset("llava-1.5", 64, {"keep": 64}, _TABLES),
        Preset("llava-next", 640, {"keep": 640}, _NEXT),
        Preset("llava-next", 320, {"keep": 320}, _NEXT),
        Preset("llava-next", 160, {"keep": 160}, _NEXT),
    )

    variants = ({"semantic": "cosine", "value_norm": "per_head"},)
    renamed = (Renamed("prune_layer", "prune_before", 1),)

    keep: Budget
    period: Annotated[int, AtLeast(1)] = 2
    ema: Annotated[float, Range(0, 1)] = 0.5
    semantic: Semantic = "dot"
    value_norm: ValueNorm = "mean"
    count_reduce: Reduce = "image"
    entropy: Annotated[float, Range(0, 1)] | None = None
    tower_keep: Budget | None = None
    prune_before: Annotated[int, AtLeast(1)] = 2
    decoder_cut: bool | None = None
    order: Order = "published"
    positions: Positions | None = None

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        return {"prune_before": max(1, decoder_layers // 2)} if decoder_layers < 4 else {}

    def cuts_in_decoder(self, facts: ModelFacts) -> bool:
        tiled = facts.tower is not None and facts.tower.tiled
        return tiled if self.decoder_cut is None else self.decoder_cut

    def tower_patches(self, facts: ModelFacts) -> int:
        """Patches that the tower keeps of each tile.

        Raises:
            ValueError: the budget is more than there is, or not one patch per tile.
        """
        tower = facts.need_tower(self.name)
        cls = int(tower.cls_in_features)
        check_fits(self.keep, facts)
        if self.tower_keep is not None:
            check_fits(self.tower_keep, facts, tower.tokens_per_tile, "tower_keep")
            rows = resolve_keep(self.tower_keep, tower.tokens_per_tile)
        else:
            tiles = tower.max_tiles
            total = resolve_keep(self.keep, tiles * tower.tokens_per_tile)
            if not self.cuts_in_decoder(facts):
                rows = total // tiles
            else:
                rows = total // 2 if tower.tiled else 2 * total
        if rows - cls < 1:
            raise ValueError(
                f"keep={self.keep} leaves {rows} of the tokens of each tile inside the vision tower"
                + (", the class token among them" if cls else "")
                + f"; it should leave at least {1 + cls}"
            )
        return min(rows - cls, tower.patches)

    def plan(self, facts: ModelFacts) -> Plan:
        if facts.tower is None and facts.packed:
            return self._plan_packed(facts)
        patches, tower = self.tower_patches(facts), facts.need_tower(self.name)
        few = patches < tower.patches
        plan = Plan(encoder=(TowerStage(self, patches, last_cut(tower)),) if few else ())
        if not self.cuts_in_decoder(facts) or (isinstance(self.keep, float) and self.keep == 1):
            return plan
        cut = DecoderCut(
            self._decoder_keep(tower, patches), self.prune_before, self.new_positions,
            self.semantic, self.value_norm,
        )  # fmt: skip
        return Plan(encoder=plan.encoder, decoder=cut.plan(facts).decoder)

    def _plan_packed(self, facts: ModelFacts) -> Plan:
        """As the official port to Qwen2-VL: twice the budget leaves the tower, and the decoder cuts
        once more."""
        check_fits(self.keep, facts)
        if self.tower_keep is not None:
            raise ValueError(
                f"tower_keep={self.tower_keep} is for towers of tiles; on {facts.family} twice the "
                "budget leaves the tower; it should be None"
            )
        if isinstance(self.keep, float) and self.keep == 1:
            return Plan()
        seen = facts.need_tower(self.name, whole=False)
        keep = self.keep if isinstance(self.keep, int) else max(0.5, self.keep)
        cut = DecoderCut(
            keep, self.prune_before, self.new_positions, self.semantic, self.value_norm
        )
        return Plan(
            encoder=(PackedStage(self, seen.encoder_layers - 1),),
            decoder=() if self.decoder_cut is False else cut.plan(facts).decoder,
        )

    def _decoder_keep(self, facts: TowerFacts, patches: int) -> Budget:
        """The budget in terms of the tokens that enter the decoder: ``patches`` of each tile."""
        if isinstance(self.keep, int):
            return self.keep
        return min(1.0, self.keep * facts.tokens_per_tile / (patches + facts.cls_in_features))
