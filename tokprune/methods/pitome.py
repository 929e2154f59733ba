"""PiToMe: merge redundant patches inside the vision encoder, protect isolated ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from tokprune.methods.base import Preset
from tokprune.methods.merging import LayerMerger
from tokprune.methods.merging.schedule import Matching, Step, Steps, merging_layers
from tokprune.methods.merging.stage import Recipe
from tokprune.methods.options import Range
from tokprune.methods.registry import register_method
from tokprune.operators.energy import EnergyKind, Split

Variant = Literal["v1", "head", "paper", "deit"]

#: from this margin on, the LLaVA runs match by plain bipartite soft matching
BSM_MARGIN = 0.45

_RECIPES: dict[Variant, Recipe] = {
    "v1": Recipe("after", "hidden", energy="gauss"),
    "head": Recipe("after", "hidden", energy="elu"),
    "paper": Recipe("between", "keys", weighted=True, prop_attn=True, energy="paper"),
    "deit": Recipe("between", "keys", weighted=True, energy="elu"),
}

_LOGS = "authors' logs (llava_w_ratio.csv), schedule v1: ratio {} leaves {} patches"
_OURS = "ratio of schedule v1 that lands on the budget; ours, the authors publish ratios"
_LOGGED = {0.85: 99, 0.875: 135, 0.9: 183, 0.925: 247, 0.95: 331}
_LANDING = {192: 0.9032, 128: 0.8699, 64: 0.8159}


def _margin(value: Any, name: str) -> None:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not (pair and all(isinstance(m, (int, float)) for m in value)):
        raise ValueError(f"{name}={value!r} should be a pair (start, slope), e.g. (0.9, 0.9)")


@register_method
@dataclass(frozen=True)
class PiToMe(LayerMerger):
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
        scope: what ``keep`` counts on tiled models: "tile", or "image" to share it
            between the most tiles that an image can have.

    Source: Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging",
    NeurIPS 2024, arXiv 2405.16148.
    """

    name = "pitome"
    needs = "hidden states (v1, head) or keys of the merging layers"
    paper = "arXiv 2405.16148"
    presets = (
        *(
            Preset("llava-1.5", f"r={ratio}", {"ratio": ratio}, _LOGS.format(ratio, left))
            for ratio, left in _LOGGED.items()
        ),
        *(Preset("llava-1.5", n, {"ratio": ratio}, _OURS) for n, ratio in _LANDING.items()),
    )

    variants = ({"variant": "head"}, {"variant": "paper"}, {"variant": "deit"})

    variant: Variant = "v1"
    energy: EnergyKind | None = None
    margin: Annotated[tuple[float, float], _margin] | None = None
    alpha: Annotated[float, Range(0.0, 1e6)] = 1.0
    split: Split = "alternate"

    @property
    def recipe(self) -> Recipe:
        own = _RECIPES[self.variant]
        return replace(own, energy=self.energy or own.energy, alpha=self.alpha, split=self.split)

    def rules(self, encoder_layers: int, last_layer: int) -> Steps:
        """The merging layers up to ``last_layer`` of ``encoder_layers``, their matchings and
        margins; how many tokens they remove is open.

        Raises:
            ValueError: a margin of 1 or more with a Gaussian energy, or no layer to merge in.
        """
        start, slope = self.margin or ((0.75, 0.75) if self.variant == "deit" else (0.9, 0.9))
        steps = []
        for layer in merging_layers(last_layer, self.variant, odd=self.variant == "v1"):
            margin = start - slope * layer / encoder_layers
            steps.append(Step(layer, self._matching(layer, encoder_layers, margin), margin))
        used = max((step.margin for step in steps if step.matching != "bsm"), default=0.0)
        if used >= 1 and self.recipe.energy.startswith("gauss"):
            raise ValueError(
                f"margin={self.margin} gives {used:.3g} in layer {steps[0].layer}; with a "
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
