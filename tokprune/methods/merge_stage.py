"""Merging inside the vision encoder, layer after layer: what PiToMe and ToMe have in common.

A schedule is a list of :class:`Step`; how many tokens each removes follows from the rules on the
host, so every tile of a batch keeps the same number and nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ModelFacts,
    Order,
    Plan,
    Positions,
    Reduction,
    TowerInput,
    TowerTokens,
)
from tokprune.errors import UnsupportedModelError
from tokprune.methods.base import Budget, check_fits, resolve_keep
from tokprune.operators.bipartite import bipartite_soft_matching, removed_by_ratio
from tokprune.operators.energy import EnergyKind, Split, energy_bsm, pitome
from tokprune.operators.merging import MergePlan, proportional_bias

Matching = Literal["bsm", "protect", "energy_bsm"]
Scope = Literal["tile", "image"]


@dataclass(frozen=True)
class Step:
    """One merge: after or inside encoder layer ``layer``, ``r`` tokens go (0: not yet known)."""

    layer: int
    matching: Matching
    margin: float = 0.0
    r: int = 0


@dataclass(frozen=True)
class Recipe:
    """How the steps of a schedule merge.

    ``place``: between attention and MLP, or after the block; ``metric``: compare the tokens
    themselves or the head mean of the layer's keys; ``weighted``: average by the number of
    patches a token stands for; ``prop_attn``: keys count by that number in later attention.
    """

    steps: tuple[Step, ...]
    place: Literal["between", "after"]
    metric: Literal["hidden", "keys"]
    weighted: bool
    prop_attn: bool
    energy: EnergyKind = "elu"
    alpha: float = 1.0
    split: Split = "alternate"


# ---------------------------------------------------------------------------- schedules


def removable(tokens: int, class_token: bool) -> int:
    """The most tokens that one merge of ``tokens`` can remove: half, the class token excluded."""
    return (tokens - class_token) // 2


def steps_by_ratio(
    rules: Sequence[Step], tokens: int, class_token: bool, ratio: float
) -> tuple[Step, ...]:
    """Steps that each keep a fraction ``ratio`` of the tokens they find.

    ``bsm`` takes the fraction of all ``tokens``, class token included, the energy matchings of
    the others, as published.
    """
    steps = []
    for rule in rules:
        counted = tokens if rule.matching == "bsm" else tokens - class_token
        r = min(removed_by_ratio(counted, ratio), removable(tokens, class_token))
        steps.append(replace(rule, r=r))
        tokens -= r
    return tuple(steps)


def steps_by_count(
    rules: Sequence[Step], tokens: int, class_token: bool, r: Sequence[int]
) -> tuple[Step, ...]:
    """Steps that each remove a given number of tokens, or as many as one merge can."""
    steps = []
    for rule, wanted in zip(rules, r):
        own = min(wanted, removable(tokens, class_token))
        steps.append(replace(rule, r=own))
        tokens -= own
    return tuple(steps)


def layer_counts(steps: Sequence[Step], tokens: int) -> list[int]:
    """Tokens, class token included, before the first step and after each."""
    counts = [tokens]
    for step in steps:
        counts.append(counts[-1] - step.r)
    return counts


def ratio_for(rules: Sequence[Step], tokens: int, class_token: bool, left: int) -> float:
    """The largest ratio (at least 0.5) that leaves no more than ``left`` tokens."""

    def enough(ratio: float) -> bool:
        steps = steps_by_ratio(rules, tokens, class_token, ratio)
        return layer_counts(steps, tokens)[-1] <= left

    low, high = 0.5, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def trim(steps: Sequence[Step], tokens: int, left: int) -> tuple[Step, ...]:
    """Let the last steps remove fewer tokens, so that exactly ``left`` remain."""
    spare = left - layer_counts(steps, tokens)[-1]
    trimmed = []
    for step in reversed(steps):
        fewer = min(spare, step.r)
        trimmed.append(replace(step, r=step.r - fewer))
        spare -= fewer
    return tuple(reversed(trimmed))


def check_reachable(rules: Sequence[Step], tokens: int, class_token: bool, left: int) -> None:
    """Every layer can halve its tokens at best.

    Raises:
        ValueError: not even that gets down to ``left``; names the smallest budget that works.
    """
    smallest = tokens
    for _ in rules:
        smallest -= removable(smallest, class_token)
    if smallest > left:
        cls = int(class_token)
        raise ValueError(
            f"keep={left - cls} tokens of {tokens - cls} cannot be reached: {len(rules)} merging "
            f"layers, each of which halves the tokens at best, leave {smallest - cls}; keep should "
            f"be at least {smallest - cls}"
        )


def last_merging_layer(facts: ModelFacts, method: str) -> int:
    """The layer whose output becomes the image features; merging later would be wasted.

    Raises:
        UnsupportedModelError: the features come from several layers (which then differ in
            length), or from before the first.
    """
    if facts.feature_layer is None:
        raise UnsupportedModelError(
            f"{method} changes the number of tokens from layer to layer, but this model "
            "concatenates the features of several encoder layers (config.vision_feature_layer)"
        )
    if facts.feature_layer < 0:
        raise UnsupportedModelError(
            f"{method} merges inside encoder layers, but this model reads the embeddings before "
            "the first one (config.vision_feature_layer)"
        )
    return facts.feature_layer


def tile_budget(keep: Budget, facts: ModelFacts, scope: Scope) -> int:
    """Tokens to keep of each tile.

    All tiles of a batch run through the tower together and keep the same number: with
    ``scope="tile"`` that is ``keep``, with ``"image"`` a share of it, by the largest number of
    tiles that an image of this model can have.

    Raises:
        ValueError: more than there are.
    """
    if scope == "tile" or isinstance(keep, float):
        check_fits(keep, facts, facts.patches)
        return resolve_keep(keep, facts.patches)
    check_fits(keep, facts, facts.patches * facts.max_tiles)
    if keep < facts.max_tiles:
        raise ValueError(
            f"keep={keep} with scope='image' is less than one token for each of the "
            f"{facts.max_tiles} tiles that an image of this model can have; keep should be at "
            f"least {facts.max_tiles}"
        )
    return keep // facts.max_tiles


def plan_merges(method: Any, facts: ModelFacts) -> Plan:
    """The plan of a method that merges by a schedule: PiToMe, ToMe. Empty where nothing merges."""
    last, cls = last_merging_layer(facts, type(method).__name__), int(facts.has_cls)
    tokens = facts.patches + cls
    left = None
    if method.keep is not None:
        left = tile_budget(method.keep, facts, method.scope) + cls
        if left == tokens:
            return Plan()
    steps = method.schedule(tokens, facts.has_cls, facts.encoder_layers, last, left)
    if not any(step.r for step in steps):
        return Plan()
    stage = MergeStage(method.recipe(steps), last, method.order, method.positions)
    return Plan(encoder=(stage,))


# ---------------------------------------------------------------------------- checks


def check_one(**options: Any) -> None:
    """Exactly one of the options is given.

    Raises:
        ValueError: none or several are; names them.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) != 1:
        got = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none of them"
        raise ValueError(f"give exactly one of {' and '.join(options)}; got {got}")


def check_margin(margin: Any) -> None:
    """None, or a pair of numbers (start, slope).

    Raises:
        ValueError: anything else.
    """
    pair = isinstance(margin, (tuple, list)) and len(margin) == 2
    if margin is None or (pair and all(isinstance(m, (int, float)) for m in margin)):
        return
    raise ValueError(f"margin={margin!r} should be a pair (start, slope), e.g. (0.9, 0.9)")


def check_rules(rules: Sequence[Step], last_layer: int, what: str) -> None:
    """There is a layer to merge in.

    Raises:
        ValueError: there is none.
    """
    if not rules:
        raise ValueError(
            f"{what} merges after odd layers only, and this model reads its features after layer "
            f"{last_layer}; use a variant that merges in every layer"
        )


# ---------------------------------------------------------------------------- the stage


class MergeStage(EncoderStage):
    """Carries out a :class:`Recipe`; steps that remove nothing are left out."""

    def __init__(self, recipe: Recipe, last_layer: int, order: Order, positions: Positions) -> None:
        self.recipe = recipe
        self.steps = {step.layer: step for step in recipe.steps if step.r > 0}
        layers = frozenset(self.steps)
        self.between_layers = layers if recipe.place == "between" else frozenset()
        self.after_layers = layers if recipe.place == "after" else frozenset()
        self.taps = layers if recipe.metric == "keys" else frozenset()
        if recipe.prop_attn and layers:
            self.bias_layers = frozenset(range(min(layers) + 1, last_layer + 1))
        self.order, self.positions = order, positions

    def start(self, tower: TowerInput) -> EncoderRun:
        return _MergeRun(self)


class _MergeRun(EncoderRun):
    def __init__(self, stage: MergeStage) -> None:
        self.stage = stage
        self.metric: Tensor | None = None
        #: patches that each row stands for [B, T, 1]; None while all are 1
        self.size: Tensor | None = None

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        self.metric = attention.key.float().mean(1)

    def bias(self, layer: int, tokens: TowerTokens) -> Tensor | None:
        return None if self.size is None else proportional_bias(self.size)

    def between(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        return self._merge(layer, hidden, tokens)

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        return self._merge(layer, hidden, tokens)

    def _merge(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        recipe, step = self.stage.recipe, self.stage.steps[layer]
        metric = hidden if recipe.metric == "hidden" else self.metric
        assert metric is not None
        plan = _match(recipe, step, metric, tokens.has_cls)
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


def _match(recipe: Recipe, step: Step, metric: Tensor, class_token: bool) -> MergePlan | None:
    if step.matching == "bsm":
        return bipartite_soft_matching(metric, step.r, class_token)
    if step.matching == "energy_bsm":
        return energy_bsm(
            metric, r=step.r, margin=step.margin, kind=recipe.energy, alpha=recipe.alpha,
            class_token=class_token,
        )  # fmt: skip
    return pitome(
        metric, r=step.r, margin=step.margin, kind=recipe.energy, alpha=recipe.alpha,
        class_token=class_token, split=recipe.split,
    )  # fmt: skip
