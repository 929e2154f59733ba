"""V²Drop: drop, in a few steps, the visual tokens that the last decoder layer hardly changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from tokprune.engine.contracts import (
    DecoderRun,
    DecoderStage,
    KeepDecision,
    ModelFacts,
    Plan,
    Positions,
    ScoringLayer,
    SequenceView,
)
from tokprune.methods.base import Method, Preset, check_fits, check_layers_fit
from tokprune.methods.depth import last_steps
from tokprune.methods.options import BudgetSchedule, LayerNumbers, check_range, is_sequence
from tokprune.methods.registry import register_method
from tokprune.methods.schedule import check_steps, mean_of_steps, steps_of, tokens_after
from tokprune.operators.v2drop import variation

_LAYERS = (3, 17, 22)
_RATIOS = (0.5, 0.5, 0.0)

_LLAVA = "constants of the official LLaVA file: 576 → 288 → 144 → 1, mean over 32 layers 202.8"
_QWEN = "constants of the official Qwen2-VL file"
_FITTED = (
    "ours: the code has one schedule; published layers, first two ratios equal and fitted to this "
    "mean over 32 layers, one token left at the end"
)


def _check_ratios(ratios: Any, name: str) -> None:
    if not is_sequence(ratios):
        raise ValueError(f"{name}={ratios!r} should be a sequence of numbers in [0, 1]")
    for i, ratio in enumerate(ratios):
        check_range(ratio, f"{name}[{i}]", 0.0, 1.0)


def _preset(budget: int, ratio: float) -> Preset:
    return Preset("llava-1.5", budget, {"ratios": (ratio, ratio, 0.0)}, _FITTED)


@register_method
@dataclass(frozen=True)
class V2Drop(Method):
    """Before each layer of ``prune_before`` those visual tokens go that the layer just run changed
    least: the length of the difference between what enters this layer and what entered the one
    before. Neither attention nor text is read. Prefill only; every image has its own budget.

    Args:
        ratios: share of the tokens it finds that each step keeps, int(n · ratio), at least 1: the
            published form of a budget. Used where ``keep`` is None.
        keep: instead of it, tokens per image left after each step, a count or fraction for each;
            fractions are of the tokens that entered the decoder. One number is the last step's:
            every step then keeps the same share of what it finds. A schedule may end in 0.
        prune_before: decoder layers, 0-based, ascending, at least 1.
        drop_all: a ratio of 0 leaves no token; the official code, and the default, leave one.
        positions: "preserve" keeps the ids (official), "compact" renumbers after every drop.

    Source: Variation-aware Vision Token Dropping for Faster Large Vision-Language Models,
    CVPR 2026, arXiv 2509.01552. Which schedules its budgets of 192, 128 and 64 tokens had is not
    known; those presets are ours.
    """

    name = "v2drop"
    stages = ("decoder prefill",)
    needs = "inputs of two consecutive layers per step"
    paper = "arXiv 2509.01552"
    presets = (
        Preset("llava-1.5", "50/50/100%", {"ratios": _RATIOS}, _LLAVA),
        Preset(
            "qwen2-vl", "75/95/100%",
            {"ratios": (0.25, 0.05, 0.0), "prune_before": (3, 16, 22)}, _QWEN,
        ),
        _preset(192, 0.469),
        _preset(128, 0.268),
        _preset(64, 0.039),
    )  # fmt: skip
    published_positions = "preserve"

    ratios: Annotated[tuple[float, ...], _check_ratios] = _RATIOS
    keep: BudgetSchedule | None = None
    prune_before: Annotated[int | tuple[int, ...], LayerNumbers(1)] = _LAYERS
    drop_all: bool = False
    positions: Positions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_steps(self.keep, self.steps, "prune_before", none_left=True)
        elif len(self.ratios) != len(self.steps):
            raise ValueError(
                f"ratios={self.ratios!r} should hold one ratio per layer of prune_before, "
                f"{len(self.steps)} in all"
            )

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        options = last_steps(_LAYERS, decoder_layers, ranked_before=True)
        if options:
            options["ratios"] = _RATIOS[-len(options["prune_before"]) :]
        return options

    def plan(self, facts: ModelFacts) -> Plan:
        if self.keep is not None:
            check_fits(self.keep, facts)
        check_layers_fit(self.prune_before, facts, first=1)
        return Plan(decoder=(_VariationStage(self),))

    @property
    def steps(self) -> tuple[int, ...]:
        """The layers before which tokens are dropped."""
        return steps_of(self.prune_before)

    def mean_tokens(self, tokens: int, layers: int) -> float | None:
        after = lambda step, now: self.count(step, tokens, now)  # noqa: E731
        return mean_of_steps(tokens, self.steps, layers, after)

    def count(self, step: int, entered: int, now: int) -> int:
        """Tokens left after step ``step`` (0-based) of an image that entered the decoder with
        ``entered`` and has ``now``."""
        if self.keep is not None:
            none = isinstance(self.keep, Sequence) and not self.keep[step]
            wanted = 0 if none else tokens_after(self.keep, step, len(self.steps), entered)
        else:
            ratio = self.ratios[step]
            wanted = max(int(now * ratio), 0 if self.drop_all and not ratio else 1)
        return min(wanted, now)


class _VariationStage(DecoderStage):
    #: no attention of a layer ahead is asked for
    ahead = frozenset()

    def __init__(self, method: V2Drop) -> None:
        self.method, self.positions = method, method.new_positions
        # what enters the layer before each cut is remembered
        self.prune_before = frozenset(method.steps) | {layer - 1 for layer in method.steps}

    def start(self) -> DecoderRun:
        return _VariationRun(self.method)


class _VariationRun(DecoderRun):
    def __init__(self, method: V2Drop) -> None:
        self.method = method
        #: [B, L, D] what entered the layer that runs, at the tokens alive, where the next one cuts
        self.entered: Tensor | None = None

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        method, before, steps = self.method, self.entered, self.method.steps
        self.entered = hidden if layer + 1 in steps else None
        if layer not in steps:
            return None
        counts = [
            [method.count(steps.index(layer), *image) for image in zip(*row)]
            for row in zip(sequence.entering, sequence.counts)
        ]
        if counts == sequence.counts:
            return None
        assert before is not None
        score = variation(before.to(hidden.device), hidden)
        return KeepDecision.best(score, counts, sequence, method.new_positions)

    def dropped(self, layer: int, index: Tensor) -> None:
        if self.entered is not None:  # the cut one where two steps follow each other
            place = index.to(self.entered.device)[:, :, None]
            self.entered = self.entered.gather(1, place.expand(-1, -1, self.entered.shape[2]))
