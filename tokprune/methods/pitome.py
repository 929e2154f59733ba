"""PiToMe: merge redundant patches inside the vision encoder, protect isolated ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

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
    Matching,
    Recipe,
    Scope,
    Step,
    check_margin,
    check_one,
    check_reachable,
    check_rules,
    plan_merges,
    ratio_for,
    steps_by_ratio,
    trim,
)
from tokprune.operators.energy import EnergyKind, Split

Variant = Literal["v1", "head", "paper", "deit"]

#: from this margin on, the LLaVA runs match by plain bipartite soft matching
BSM_MARGIN = 0.45


@dataclass(frozen=True)
class _Defaults:
    """What sets the variants apart."""

    energy: EnergyKind
    margin: tuple[float, float]
    every_layer: bool
    place: Literal["between", "after"]
    metric: Literal["hidden", "keys"]
    weighted: bool
    prop_attn: bool


_VARIANTS: dict[str, _Defaults] = {
    "v1": _Defaults("gauss", (0.9, 0.9), False, "after", "hidden", False, False),
    "head": _Defaults("elu", (0.9, 0.9), True, "after", "hidden", False, False),
    "paper": _Defaults("paper", (0.9, 0.9), True, "between", "keys", True, True),
    "deit": _Defaults("elu", (0.75, 0.75), True, "between", "keys", True, False),
}

_LOGS = "authors' logs (llava_w_ratio.csv), schedule v1: ratio {} leaves {} patches"
_OURS = "ratio of schedule v1 that lands on the budget; ours, the authors publish ratios"


def _presets() -> tuple[Preset, ...]:
    ratios = {0.85: 99, 0.875: 135, 0.9: 183, 0.925: 247, 0.95: 331}
    logged = [
        Preset("llava-1.5", f"r={ratio}", {"ratio": ratio}, _LOGS.format(ratio, n))
        for ratio, n in ratios.items()
    ]
    landing = {192: 0.9032, 128: 0.8699, 64: 0.8159}
    ours = [Preset("llava-1.5", n, {"ratio": ratio}, _OURS) for n, ratio in landing.items()]
    return (*logged, *ours)


@register_method
@dataclass(frozen=True)
class PiToMe(Method):
    """Layer after layer, tokens of high energy (mean thresholded similarity to all others) merge
    into each other; tokens of low energy and the class token are protected. Text-agnostic.

    Variants: ``v1``, behind the published LLaVA numbers: after every odd layer, plain means,
    compared by the hidden state, ordinary bipartite matching while the margin is at least 0.45
    (half of the depth), then protection with the Gaussian energy. ``head``, the authors' newest
    code: the same after every layer, with the ELU energy. ``paper``: every layer, between
    attention and MLP, keys, protection everywhere with Eq. 4, means weighted by token size,
    proportional attention. ``deit``, the authors' image classifiers: as ``paper`` without
    proportional attention; the first half of the layers matches by energy ranks.

    Merging stops at the layer whose output the model reads. All tiles of a batch keep the same
    number. On tiled models (the authors have none) each tile is merged on its own; padding is
    merged like everything else, and newline tokens go.

    Args:
        keep: tokens left of each tile (count) or fraction: the ratio is searched, then the last
            merging layers trimmed to hit it exactly. Give ``keep`` or ``ratio``.
        ratio: fraction of tokens that each merging layer keeps, 0.5 … 1: the published knob.
        variant: "v1", "head", "paper" or "deit".
        energy: "elu", "gauss", "paper", …; None: the variant's.
        margin: (start, slope): layer i of L has margin start − slope·i/L; None: the variant's.
        alpha: floor of the ELU energies.
        split: partners by "alternate" energy ranks, or "halves".
        order: of the tokens in the prompt, "published" (as they leave the tower: protected by
            falling energy, then merged) or "spatial".
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models, see above: "tile", or "image" to share it
            between the most tiles that an image can have.

    Source: Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging",
    NeurIPS 2024, arXiv 2405.16148.
    """

    name: ClassVar[str] = "pitome"
    stages: ClassVar[tuple[str, ...]] = ("encoder layers",)
    needs: ClassVar[str] = "hidden states (v1, head) or keys of the merging layers"
    paper: ClassVar[str] = "arXiv 2405.16148"
    presets: ClassVar[tuple[Preset, ...]] = _presets()

    keep: Budget | None = None
    ratio: float | None = None
    variant: Variant = "v1"
    energy: EnergyKind | None = None
    margin: tuple[float, float] | None = None
    alpha: float = 1.0
    split: Split = "alternate"
    order: Order = "published"
    positions: Positions = "compact"
    scope: Scope = "tile"

    def __post_init__(self) -> None:
        check_one(keep=self.keep, ratio=self.ratio)
        if self.keep is not None:
            check_keep(self.keep)
        if self.ratio is not None:
            check_range(self.ratio, "ratio", 0.5, 1.0)
        check_choice(self.variant, "variant", tuple(_VARIANTS))
        kinds = (None, "elu", "gauss", "gauss_text", "paper", "elu_sharp")
        check_choice(self.energy, "energy", kinds)
        check_margin(self.margin)
        check_range(self.alpha, "alpha", 0.0, 1e6)
        check_choice(self.split, "split", ("alternate", "halves"))
        check_choice(self.order, "order", ("published", "spatial"))
        check_choice(self.positions, "positions", ("compact", "preserve"))
        check_choice(self.scope, "scope", ("tile", "image"))

    def rules(self, encoder_layers: int, last_layer: int) -> tuple[Step, ...]:
        """The merging layers up to ``last_layer`` of ``encoder_layers``, their matchings and
        margins; how many tokens they remove is open.

        Raises:
            ValueError: a margin of 1 or more with a Gaussian energy, or no layer to merge in.
        """
        defaults = _VARIANTS[self.variant]
        start, slope = self.margin or defaults.margin
        steps = []
        for layer in range(last_layer + 1):
            margin = start - slope * layer / encoder_layers
            if defaults.every_layer or layer % 2:
                steps.append(Step(layer, self._matching(layer, encoder_layers, margin), margin))
        check_rules(steps, last_layer, f"variant={self.variant!r}")
        gauss = (self.energy or defaults.energy).startswith("gauss")
        used = [step.margin for step in steps if step.matching != "bsm"]
        if gauss and max(used, default=0.0) >= 1:
            raise ValueError(
                f"margin={self.margin} gives {max(used):.3g} in layer {steps[0].layer}; with a "
                "Gaussian energy margins should be below 1"
            )
        return tuple(steps)

    def _matching(self, layer: int, encoder_layers: int, margin: float) -> Matching:
        if self.variant == "paper":
            return "protect"
        if self.variant == "deit":
            return "energy_bsm" if 2 * layer < encoder_layers else "protect"
        if self.variant == "head":
            return "bsm" if 2 * layer <= encoder_layers else "protect"
        return "bsm" if margin >= BSM_MARGIN - 1e-9 else "protect"

    def recipe(self, steps: tuple[Step, ...]) -> Recipe:
        """What the steps do in this variant."""
        defaults = _VARIANTS[self.variant]
        return Recipe(
            steps=steps,
            place=defaults.place,
            metric=defaults.metric,
            weighted=defaults.weighted,
            prop_attn=defaults.prop_attn,
            energy=self.energy or defaults.energy,
            alpha=self.alpha,
            split=self.split,
        )

    def schedule(
        self, tokens: int, class_token: bool, encoder_layers: int, last_layer: int,
        left: int | None = None,
    ) -> tuple[Step, ...]:  # fmt: skip
        """Steps for towers of ``tokens`` rows (class token included): by ``ratio``, or, where
        there is none, down to exactly ``left`` rows. Host arithmetic only.

        Raises:
            ValueError: ``left`` cannot be reached.
        """
        rules = self.rules(encoder_layers, last_layer)
        if self.ratio is not None:
            return steps_by_ratio(rules, tokens, class_token, self.ratio)
        assert left is not None
        check_reachable(rules, tokens, class_token, left)
        ratio = ratio_for(rules, tokens, class_token, left)
        return trim(steps_by_ratio(rules, tokens, class_token, ratio), tokens, left)

    def plan(self, facts: ModelFacts) -> Plan:
        return plan_merges(self, facts)
