"""ToMe: bipartite soft matching in every layer of the vision encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from tokprune.engine.contracts import ModelFacts, Order, Plan, Positions
from tokprune.methods.base import (
    Budget,
    Method,
    Preset,
    check_choice,
    check_keep,
    check_range,
    register_method,
)
from tokprune.methods.merge_stage import (
    Recipe,
    Scope,
    Step,
    check_one,
    check_reachable,
    check_rules,
    layer_counts,
    plan_merges,
    ratio_for,
    steps_by_count,
    steps_by_ratio,
    trim,
)
from tokprune.operators.bipartite import parse_r

Variant = Literal["official", "pitome_baseline", "pitome_baseline_head"]
Removals: TypeAlias = "int | tuple[int, float] | Sequence[int]"

_VARIANTS = ("official", "pitome_baseline", "pitome_baseline_head")
_ROWS = "ToMe rows of PiToMe's logs (llava_w_ratio.csv): ratio {} leaves {} patches"
_PORT = "LightCompress port of ToMe to LLaVA: r = 16, no proportional attention, 208 patches"


def _presets() -> tuple[Preset, ...]:
    ratios = {0.85: 98, 0.875: 134, 0.9: 183, 0.925: 246, 0.95: 331}
    rows = [
        Preset(
            "llava-1.5",
            f"r={ratio}",
            {"ratio": ratio, "variant": "pitome_baseline"},
            _ROWS.format(ratio, n),
        )
        for ratio, n in ratios.items()
    ]
    port = {"r": 16, "prop_attn": False}
    return (*rows, Preset("llava-1.5", 208, port, _PORT))


@register_method
@dataclass(frozen=True)
class ToMe(Method):
    """In every layer, the even tokens that resemble an odd token most merge into it.
    Text-agnostic; the class token is never merged.

    Variants: ``official``: between attention and MLP, compared by the head mean of the layer's
    keys, means weighted by token size, proportional attention from the second merging layer on
    (needs sdpa or eager attention). ``pitome_baseline``, the ToMe rows of PiToMe's LLaVA tables:
    after every odd layer, compared by the hidden state, plain means, driven by a ratio;
    ``pitome_baseline_head``: the same after every layer.

    Merging stops at the layer whose output the model reads. All tiles of a batch keep the same
    number; on tiled models each tile is merged on its own and newline tokens go.

    Args:
        r: tokens that each layer removes: a number, (r, inflect), or one number a layer; a layer
            removes at most half of its tokens. Give one of ``r``, ``keep``, ``ratio``.
        keep: tokens left of each tile (count) or fraction; the same r everywhere (bent by
            ``inflect``; for the baselines a ratio), trimmed in the last layers to hit it exactly.
        ratio: fraction that each merging layer keeps, 0.5 … 1 (baseline variants).
        inflect: schedule of ``r``: 0 constant, −1 falling from 2r to 0, +1 rising.
        prop_attn: proportional attention (official variant).
        variant: "official", "pitome_baseline" or "pitome_baseline_head".
        order: of the tokens in the prompt, "published" (as they leave the tower) or "spatial".
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image" to share it between the
            most tiles that an image can have.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461.
    """

    name: ClassVar[str] = "tome"
    stages: ClassVar[tuple[str, ...]] = ("encoder layers",)
    needs: ClassVar[str] = "keys of the merging layers"
    paper: ClassVar[str] = "arXiv 2210.09461"
    presets: ClassVar[tuple[Preset, ...]] = _presets()

    r: Removals | None = None
    keep: Budget | None = None
    ratio: float | None = None
    inflect: float = 0.0
    prop_attn: bool = True
    variant: Variant = "official"
    order: Order = "published"
    positions: Positions = "compact"
    scope: Scope = "tile"

    def __post_init__(self) -> None:
        check_one(r=self.r, keep=self.keep, ratio=self.ratio)
        check_choice(self.variant, "variant", _VARIANTS)
        check_range(self.inflect, "inflect", -1.0, 1.0)
        if self.keep is not None:
            check_keep(self.keep)
        if self.ratio is not None:
            if self.variant == "official":
                raise ValueError(
                    f"ratio={self.ratio} drives the baseline variants; with variant='official' "
                    "give r or keep"
                )
            check_range(self.ratio, "ratio", 0.5, 1.0)
        if self.r is not None:
            _check_removals(self.r)
            if not isinstance(self.r, int) and self.inflect:
                raise ValueError(
                    f"inflect={self.inflect} bends a single r; r={self.r!r} is a schedule already"
                )
        check_choice(self.order, "order", ("published", "spatial"))
        check_choice(self.positions, "positions", ("compact", "preserve"))
        check_choice(self.scope, "scope", ("tile", "image"))

    def rules(self, last_layer: int) -> tuple[Step, ...]:
        """The layers that may merge, up to ``last_layer``."""
        odd = self.variant == "pitome_baseline"
        rules = tuple(Step(i, "bsm") for i in range(last_layer + 1) if i % 2 or not odd)
        check_rules(rules, last_layer, f"variant={self.variant!r}")
        return rules

    def recipe(self, steps: tuple[Step, ...]) -> Recipe:
        """What the steps do in this variant."""
        if self.variant != "official":
            return Recipe(steps, "after", "hidden", weighted=False, prop_attn=False)
        return Recipe(steps, "between", "keys", weighted=True, prop_attn=self.prop_attn)

    def schedule(
        self, tokens: int, class_token: bool, encoder_layers: int, last_layer: int,
        left: int | None = None,
    ) -> tuple[Step, ...]:  # fmt: skip
        """Steps for towers of ``tokens`` rows (class token included): by ``r`` or ``ratio``, or,
        where there is neither, down to exactly ``left`` rows. Host arithmetic only.

        Raises:
            ValueError: ``left`` cannot be reached, or ``r`` lists more layers than there are.
        """
        rules = self.rules(last_layer)
        if self.ratio is not None:
            return steps_by_ratio(rules, tokens, class_token, self.ratio)

        def by_count(r: Removals) -> tuple[Step, ...]:
            counts = parse_r(encoder_layers, r)
            own = [counts[rule.layer] for rule in rules]
            return steps_by_count(rules, tokens, class_token, own)

        if self.r is not None:
            if isinstance(self.r, int):
                return by_count((self.r, self.inflect))
            if not isinstance(self.r, tuple) and len(self.r) > encoder_layers:
                raise ValueError(
                    f"r lists {len(self.r)} layers; the vision tower has {encoder_layers}"
                )
            return by_count(self.r)
        assert left is not None
        check_reachable(rules, tokens, class_token, left)
        if self.variant != "official":
            ratio = ratio_for(rules, tokens, class_token, left)
            steps = steps_by_ratio(rules, tokens, class_token, ratio)
        else:
            for r in range(tokens):
                steps = by_count((r, self.inflect))
                if layer_counts(steps, tokens)[-1] <= left:
                    break
            else:
                raise ValueError(
                    f"keep={left - class_token} cannot be reached with inflect={self.inflect}: "
                    f"{layer_counts(steps, tokens)[-1] - class_token} is the smallest"
                )
        return trim(steps, tokens, left)

    def plan(self, facts: ModelFacts) -> Plan:
        return plan_merges(self, facts)


def _check_removals(r: Removals) -> None:
    """A count, (count, inflect) or a list of counts.

    Raises:
        ValueError: anything else.
    """
    if isinstance(r, int) and not isinstance(r, bool):
        counts: list[object] = [r]
    elif isinstance(r, tuple) and len(r) == 2:
        check_range(r[1], "r[1] (inflect)", -1.0, 1.0)
        counts = [r[0]]
    elif isinstance(r, Sequence) and not isinstance(r, (str, tuple)):
        counts = list(r)
    else:
        counts = [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts):
        raise ValueError(
            f"r={r!r} should be a count of tokens ≥ 0, a pair (count, inflect), or a list of counts"
        )
