"""Merging inside the vision encoder, layer after layer: what PiToMe and ToMe have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

from tokprune.engine.contracts import Plan
from tokprune.engine.model import ModelFacts
from tokprune.methods.merging.schedule import Steps, steps_by_ratio, steps_down_to
from tokprune.methods.merging.stage import MergeStage, Recipe
from tokprune.methods.options import Range
from tokprune.methods.tiles import TileMethod, feature_layer


@dataclass(frozen=True)
class LayerMerger(TileMethod):
    """Merges in one encoder layer after the other, up to the one whose output the model reads."""

    stages = ("encoder layers",)
    one_of: ClassVar[tuple[str, ...]] = ("keep", "ratio")
    budget_options = frozenset({"keep", "ratio"})

    #: fraction of its tokens that each merging layer keeps
    ratio: Annotated[float, Range(0.5, 1.0)] | None = None

    @property
    @abstractmethod
    def recipe(self) -> Recipe:
        """How this variant merges."""

    @abstractmethod
    def rules(self, encoder_layers: int, last_layer: int) -> Steps:
        """The merging layers up to ``last_layer`` of ``encoder_layers``; how many tokens they
        remove is open."""

    def schedule(
        self, tokens: int, class_token: bool, encoder_layers: int, last_layer: int,
        left: int | None = None,
    ) -> Steps:  # fmt: skip
        """Steps for towers of ``tokens`` rows (class token included): by ``ratio``, or, where
        there is none, down to exactly ``left`` rows. Host arithmetic only.

        Raises:
            ValueError: ``left`` cannot be reached.
        """
        rules = self.rules(encoder_layers, last_layer)
        if self.ratio is not None:
            return steps_by_ratio(rules, tokens, class_token, self.ratio)
        assert left is not None
        return steps_down_to(rules, tokens, class_token, left)

    def plan(self, facts: ModelFacts) -> Plan:
        tower = facts.need_tower(self.name)
        last, cls = feature_layer(tower, type(self).__name__), int(tower.has_cls)
        tokens, left = tower.patches + cls, None
        if self.keep is not None:
            left = self.tile_budget(facts) + cls
            if left == tokens:
                return Plan()
        steps = self.schedule(tokens, tower.has_cls, tower.encoder_layers, last, left)
        if not any(step.r for step in steps):
            return Plan()
        return Plan(encoder=(MergeStage(self.recipe, steps, last, self.order, self.new_positions),))
