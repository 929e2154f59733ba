"""ToDRE: a diverse subset after the projector, then all visual tokens go once text ignores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tokprune.engine.contracts import ModelFacts, Plan, Positions
from tokprune.engine.model import ImageLayout
from tokprune.methods.base import Method, Preset, check_fits, resolve_keep
from tokprune.methods.centring import Centre
from tokprune.methods.options import Budget, LayerNumbers, Range, Renamed, Seed
from tokprune.methods.registry import register_method
from tokprune.methods.schedule import steps_of
from tokprune.methods.todre.diversity import ClassAttention, DiversityStage
from tokprune.methods.todre.relevance import RelevanceStage

Select = Literal["max_sum", "k_center"]
Pivot = Literal["cls", "farthest", "center", "random"]

_PAPER = "arXiv 2505.18757v2, Table 1"


@register_method
@dataclass(frozen=True)
class ToDRE(Method):
    """Two stages, each usable alone. Stage 1 keeps the ``keep`` most diverse patches of every
    image, all its tiles together. Stage 2 looks at one decoder layer: where text and image attend
    to each other less than ``tau``, that sample's visual tokens are all dropped.

    Newline tokens are no candidates and go; survivors enter in prompt order. Stage 2 decides per
    sample and costs one read by the host. An image that has no more patches than ``keep`` is left
    untouched. With a several-image prompt each image is selected on its own, and stage 2 drops
    all images of the sample or none.

    Args:
        keep: visual tokens per image (count) or fraction of the image's patches (floored, at
            least 1); None or 1.0 runs stage 2 alone.
        select: "max_sum" (v2 of the paper) or "k_center" (v1).
        centre: "plain" or "standardised" compares tokens around their mean; ``k_center`` then also
            weighs distances by how unlike all others a token is ("Centering before Pruning",
            arXiv 2608.30263; on ToDRE's rules it is ours). "none" as ToDRE itself.
        pivot: the first token: "cls" has the largest [CLS] attention of the last vision layer
            (tiled images: of the base tile; videos: of all frames, after the model's own pooling);
            "farthest" from or "center" nearest to the mean feature; "random" (seeded). "cls"
            becomes "farthest" on a tower without class token.
        seed: of the random pivot.
        tau: stage 2 drops where both ratios are below it.
        prune_before: decoder layers, 0-based, before which stage 2 looks, at the attention of the
            layer before; the first where the rule holds drops. None means ⌊7L/8⌋ of L layers. L
            itself decides but saves nothing.
        stage2: False runs stage 1 alone.
        positions: of stage 1: "compact" renumbers the shortened prompt, "preserve" keeps the
            original ids. After stage 2 the text keeps the ids it has.

    Source: ToDRE, arXiv 2505.18757v2 (v1 for ``k_center``); no official code exists.
    """

    name = "todre"
    stages = ("after projector", "decoder prefill")
    needs = "features, [CLS] attention (pivot), text attention of one decoder layer"
    paper = "arXiv 2505.18757"
    source = "paper's equations"
    reads_prompt = "stage 2"
    adaptive = "stage 2 drops all of an image's tokens or none"
    without_class_token = (
        "the pivot is the token farthest from the mean, not the one the class token names"
    )
    presets = (
        Preset("llava-next", 720, {"keep": 720}, f"{_PAPER}: 25 % of 2880"),
        Preset("llava-next", 288, {"keep": 288}, f"{_PAPER}: 10 % of 2880"),
        Preset("llava-next", "stage 2", {"keep": None}, "arXiv 2505.18757v2, stage 2 alone"),
    )

    variants = ({"select": "k_center"}, {"stage2": False})
    renamed = (Renamed("check_layers", "prune_before"),)

    keep: Budget | None
    select: Select = "max_sum"
    centre: Centre = "none"
    pivot: Pivot = "cls"
    seed: Seed = 0
    tau: Annotated[float, Range(0, 1)] = 0.10
    prune_before: Annotated[int | tuple[int, ...], LayerNumbers(1)] | None = None
    stage2: bool = True
    positions: Positions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is None and not self.stage2:
            raise ValueError(
                "keep=None with stage2=False does nothing; keep should be a count or a fraction, "
                "or stage2 should be True"
            )

    @property
    def stochastic(self) -> bool:
        return self.pivot == "random"

    def plan(self, facts: ModelFacts) -> Plan:
        if self.keep is not None:
            tower = facts.tower
            most = None
            if tower is not None and not facts.videos:
                most = tower.max_tiles * tower.tokens_per_tile
            check_fits(self.keep, facts, most)
        depth = facts.decoder_layers
        relative = max(1, 7 * depth // 8)
        layers = steps_of(relative if self.prune_before is None else self.prune_before)
        if max(layers) > depth:
            raise ValueError(
                f"prune_before={self.prune_before!r} should lie between 1 and {depth}: layers "
                f"count from 0, and this model has {depth} decoder layers"
            )
        decoder = (RelevanceStage(self.tau, layers, depth),) if self.stage2 else ()
        if self.keep is None or (isinstance(self.keep, float) and self.keep == 1):
            return Plan(decoder=decoder)
        encoder: tuple[ClassAttention, ...] = ()
        seen = facts.tower or facts.observed
        if self.pivot == "cls" and seen is not None and seen.has_cls:
            encoder = (ClassAttention(seen.encoder_layers - 1),)
        return Plan(
            encoder=encoder,
            prompt=(DiversityStage(self, self.keep),),
            decoder=decoder,
        )

    def fixed_count(self, facts: ModelFacts, layout: ImageLayout) -> int | None:
        left = layout.patches if self.keep is None else resolve_keep(self.keep, layout.patches)
        return left if left < layout.patches else layout.count
