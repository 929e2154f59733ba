"""TransPrune: drop, in three steps, the image tokens that the decoder's modules change least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from tokprune.engine.contracts import ModelFacts, Plan, Positions
from tokprune.methods.base import Method, Preset, check_fits, check_layers_fit
from tokprune.methods.depth import LEAST_DEPTH, scaled_layers
from tokprune.methods.options import (
    Budget,
    BudgetSchedule,
    PruneBefore,
    Range,
    Renamed,
    check_layers,
)
from tokprune.methods.registry import register_method
from tokprune.methods.schedule import check_steps, mean_of_steps, steps_of
from tokprune.methods.transprune_stage import TransPruneStage
from tokprune.operators.transition import Direction, Normalize

_LAYERS = (7, 9, 12)
#: the published schedule, and the share of all dropped tokens that each of its steps drops
_HIGH = (0.875, 0.625, 0.125)
_SHARES = ((1, 7), (3, 7), (7, 7))
_LOW = (0.625, 0.1875, 0.0625)

_HIGH_SOURCE = "TransPrune-High: ratios of all official scripts"
_LOW_SOURCE = (
    "TransPrune-Low: ratios inferred from the printed TFLOPs (the counts were never published)"
)


@register_method
@dataclass(frozen=True)
class TransPrune(Method):
    """Ranks image tokens by their transitions (length ratio times change of direction in every
    attention and MLP module, summed over layers) and by the attention that the text after the
    image pays them; drops the lowest before each of ``prune_before``.

    Every image has its own budget and its own normalised score. Text after the sample's last
    image asks; where there is none, transitions alone rank (with a warning).

    Args:
        keep: tokens per image left after each step, a count or a fraction for each;
            fractions are of the tokens that entered the decoder, int(n · fraction). One number
            is the last step of a three-step schedule (or the only step): the earlier steps then
            drop 1/7 and 3/7 of what is dropped in all, which for 0.125 is the published
            (0.875, 0.625, 0.125). An explicit schedule may end in 0 (no visual token left).
        prune_before: decoder layers, 0-based and ascending, before which tokens are dropped.
        transition_layers: decoder layers, 0-based and ascending, whose transitions are summed.
        alpha: weight of the transitions; 1 reads no attention at all, 0 reads attention only.
        direction: "signed" uses 1 − cos (official code), "abs" 1 − |cos| (paper).
        normalize: transitions of one module are normalised over the "sample" (its real tokens)
            or over the "batch" as in the official code; the same for one sample.
        positions: "compact" renumbers after every drop (official), "preserve" keeps the ids.

    Source: TransPrune: Token Transition Pruning, CVPR 2026, arXiv 2507.20630.
    """

    name = "transprune"
    stages = ("decoder prefill",)
    needs = "module inputs and outputs of six layers, text attention of three layers"
    paper = "arXiv 2507.20630"
    reads_prompt = True
    presets = (
        Preset("llava-1.5", "high", {"keep": _HIGH}, _HIGH_SOURCE),
        Preset("llava-1.5", "low", {"keep": _LOW}, _LOW_SOURCE),
        Preset("llava-next", "high", {"keep": _HIGH}, _HIGH_SOURCE),
        Preset("llava-next", "low", {"keep": _LOW}, _LOW_SOURCE),
    )
    variants = ({"alpha": 1.0}, {"direction": "abs"})
    renamed = (
        Renamed("prune_layers", "prune_before"),
        Renamed("accumulate_layers", "transition_layers", -1),
    )

    keep: BudgetSchedule = _HIGH
    prune_before: PruneBefore = _LAYERS
    transition_layers: tuple[int, ...] = (6, 7, 8, 9, 10, 11)
    alpha: Annotated[float, Range(0, 1)] = 0.5
    direction: Direction = "signed"
    normalize: Normalize = "sample"
    positions: Positions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.keep, self.steps, "prune_before", none_left=True)
        if not isinstance(self.keep, Sequence) and len(self.steps) not in (1, 3):
            raise ValueError(
                f"keep={self.keep!r} stands for the last of 3 steps; with {len(self.steps)} layers "
                f"in prune_before it should be a sequence of {len(self.steps)} budgets"
            )
        if self.transition_layers != ():
            check_layers(self.transition_layers, "transition_layers")
        first = min(self.steps)
        if self.alpha == 1 and not any(layer < first for layer in steps_of(self.transition_layers)):
            raise ValueError(
                f"transition_layers={self.transition_layers!r} has no layer before the first of "
                f"prune_before, {first}: with alpha=1 nothing would rank there; it should"
            )

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        if decoder_layers >= LEAST_DEPTH:
            return {}
        steps = _LAYERS if decoder_layers > len(_LAYERS) else _LAYERS[1:2]
        layers = scaled_layers(steps, decoder_layers, first=1, last=decoder_layers - 1)
        return {
            "prune_before": layers,
            "transition_layers": tuple(range(layers[0] - 1, layers[-1])),
        }

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        check_layers_fit(self.prune_before, facts, first=1)
        check_layers_fit(self.transition_layers, facts, name="transition_layers")
        return Plan(decoder=(TransPruneStage(self),))

    @property
    def steps(self) -> tuple[int, ...]:
        """The layers before which tokens are dropped."""
        return steps_of(self.prune_before)

    def mean_tokens(self, tokens: int, layers: int) -> float | None:
        after = lambda step, now: self.count(step, tokens)  # noqa: E731
        return mean_of_steps(tokens, self.steps, layers, after)

    def count(self, step: int, tokens: int) -> int:
        """Tokens left after step ``step`` (0-based) of an image that entered with ``tokens``."""
        if isinstance(self.keep, Sequence):
            return _resolve(self.keep[step], tokens)
        if len(self.steps) == 1:
            return _resolve(self.keep, tokens)
        part, whole = _SHARES[step]
        if isinstance(self.keep, int):
            return tokens - max(0, tokens - self.keep) * part // whole
        return int(tokens * (1 - (1 - self.keep) * part / whole))


def _resolve(budget: Budget, tokens: int) -> int:
    return min(budget, tokens) if isinstance(budget, int) else int(tokens * budget)
