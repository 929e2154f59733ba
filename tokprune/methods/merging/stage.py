"""The stage that merges inside the vision encoder, layer after layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    Order,
    Positions,
    Reduction,
    TowerInput,
    TowerTokens,
)
from tokprune.methods.merging.schedule import Step, Steps
from tokprune.operators.bipartite import bipartite_soft_matching
from tokprune.operators.energy import EnergyKind, Split, energy_bsm, pitome
from tokprune.operators.merging import MergePlan, proportional_bias


@dataclass(frozen=True)
class Recipe:
    """How the steps of a schedule merge."""

    #: between attention and MLP, or after the block
    place: Literal["between", "after"]
    #: compare the tokens themselves, or the head mean of the layer's keys
    metric: Literal["hidden", "keys"]
    #: average by the number of patches that a token stands for
    weighted: bool = False
    #: keys count by that number in later attention
    prop_attn: bool = False
    energy: EnergyKind = "elu"
    #: floor of the ELU energies
    alpha: float = 1.0
    split: Split = "alternate"

    def match(self, step: Step, metric: Tensor, class_token: bool) -> MergePlan | None:
        """Which rows of ``metric`` [B, T, C] merge; None where none do."""
        if step.matching == "bsm":
            return bipartite_soft_matching(metric, step.r, class_token)
        options: dict[str, Any] = {
            "r": step.r, "margin": step.margin, "kind": self.energy, "alpha": self.alpha,
            "class_token": class_token,
        }  # fmt: skip
        if step.matching == "energy_bsm":
            return energy_bsm(metric, **options)
        return pitome(metric, **options, split=self.split)


class MergeStage(EncoderStage):
    """Carries out steps by a recipe; those that remove nothing are left out.

    Args:
        last_layer: encoder layer whose output the model reads.
    """

    def __init__(
        self, recipe: Recipe, steps: Steps, last_layer: int, order: Order, positions: Positions
    ) -> None:
        self.recipe = recipe
        self.steps = {step.layer: step for step in steps if step.r > 0}
        layers = frozenset(self.steps)
        self.between_layers = layers if recipe.place == "between" else frozenset()
        self.after_layers = layers if recipe.place == "after" else frozenset()
        self.taps = layers if recipe.metric == "keys" else frozenset()
        if recipe.prop_attn and layers:
            self.bias_layers = frozenset(range(min(layers) + 1, last_layer + 1))
        self.order, self.positions = order, positions

    def start(self, tower: TowerInput) -> EncoderRun:
        return MergeRun(self)


class MergeRun(EncoderRun):
    def __init__(self, stage: MergeStage) -> None:
        self.stage = stage
        #: head mean of the layer's keys [B, T, d]
        self.keys: Tensor | None = None
        #: patches that each row stands for [B, T, 1]; None while all are 1
        self.size: Tensor | None = None

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        self.keys = attention.key.float().mean(1)

    def bias(self, layer: int, tokens: TowerTokens) -> Tensor | None:
        return None if self.size is None else proportional_bias(self.size)

    def between(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        return self._merge(layer, hidden, tokens)

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        return self._merge(layer, hidden, tokens)

    def _merge(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        recipe = self.stage.recipe
        metric = hidden if recipe.metric == "hidden" else self.keys
        assert metric is not None
        plan = recipe.match(self.stage.steps[layer], metric, tokens.has_cls)
        if plan is None:
            return None
        if recipe.weighted:
            size = None if self.size is None else self.size.to(hidden.device)
            merged, self.size = plan.weighted(hidden, size)
        else:
            merged = plan.apply(hidden)
        return Reduction(plan.representatives(), merged, plan.group())

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        # A merged row on a cell that the packing crops away may hold cells that it shows.
        return EncoderOutcome(unpad=False)
