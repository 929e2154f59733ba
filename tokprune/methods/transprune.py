"""TransPrune: drop, in three steps, the image tokens that the decoder's modules change least."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
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
from tokprune.methods.base import (
    Budget,
    BudgetSchedule,
    Method,
    Preset,
    check_choice,
    check_fits,
    check_keep,
    check_range,
    register_method,
)
from tokprune.operators.topk import segment_topk
from tokprune.operators.transition import instruction_rows, transition_score, transition_weight

Direction = Literal["signed", "abs"]
Normalize = Literal["sample", "batch"]

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
    image pays them; drops the lowest before each of ``prune_layers``.

    Every image has its own budget and its own normalised score. Text after the sample's last
    image asks; where there is none, transitions alone rank (with a warning).

    Args:
        keep: tokens per image left after each prune layer, a count or fraction per step;
            fractions are of the tokens that entered the decoder, int(n · fraction). One number
            is the last step of a three-step schedule (or the only step): the earlier steps then
            drop 1/7 and 3/7 of what is dropped in all, which for 0.125 is the published
            (0.875, 0.625, 0.125). An explicit schedule may end in 0 (no visual token left).
        prune_layers: decoder layers, counted from 1 and ascending, after which tokens are dropped.
        accumulate_layers: layers, counted from 1, whose transitions are summed.
        alpha: weight of the transitions; 1 reads no attention at all, 0 reads attention only.
        direction: "signed" uses 1 − cos (official code), "abs" 1 − |cos| (paper).
        normalize: transitions of one module are normalised over the "sample" (its real tokens)
            or over the "batch" as in the official code; the same for one sample.
        positions: "compact" renumbers after every drop (official), "preserve" keeps the ids.

    Source: TransPrune: Token Transition Pruning, CVPR 2026, arXiv 2507.20630.
    """

    name: ClassVar[str] = "transprune"
    stages: ClassVar[tuple[str, ...]] = ("decoder prefill",)
    needs: ClassVar[str] = "module inputs and outputs of six layers, text rows of three layers"
    paper: ClassVar[str] = "arXiv 2507.20630"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset("llava-1.5", "high", {"keep": _HIGH}, _HIGH_SOURCE),
        Preset("llava-1.5", "low", {"keep": _LOW}, _LOW_SOURCE),
        Preset("llava-next", "high", {"keep": _HIGH}, _HIGH_SOURCE),
        Preset("llava-next", "low", {"keep": _LOW}, _LOW_SOURCE),
    )

    keep: BudgetSchedule = _HIGH
    prune_layers: Sequence[int] = (7, 9, 12)
    accumulate_layers: Sequence[int] = (7, 8, 9, 10, 11, 12)
    alpha: float = 0.5
    direction: Direction = "signed"
    normalize: Normalize = "sample"
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        _check_layers(self.prune_layers, "prune_layers")
        _check_layers(self.accumulate_layers, "accumulate_layers")
        if not self.prune_layers:
            raise ValueError("prune_layers=() should name at least one layer")
        self._check_schedule()
        check_range(self.alpha, "alpha", 0, 1)
        check_choice(self.direction, "direction", ("signed", "abs"))
        check_choice(self.normalize, "normalize", ("sample", "batch"))
        check_choice(self.positions, "positions", ("compact", "preserve"))
        first = min(self.prune_layers)
        if self.alpha == 1 and not any(layer <= first for layer in self.accumulate_layers):
            raise ValueError(
                f"accumulate_layers={self.accumulate_layers!r} has no layer up to the first of "
                f"prune_layers, {first}: with alpha=1 nothing would rank there; it should"
            )

    def _check_schedule(self) -> None:
        steps = len(self.prune_layers)
        if not isinstance(self.keep, Sequence) or isinstance(self.keep, str):
            check_keep(self.keep)
            if steps not in (1, 3):
                raise ValueError(
                    f"keep={self.keep!r} stands for the last of 3 steps; with {steps} prune_layers "
                    f"it should be a sequence of {steps} budgets"
                )
            return
        if len(self.keep) != steps:
            raise ValueError(
                f"keep={self.keep!r} should hold one budget per prune layer, {steps} in all"
            )
        for i, budget in enumerate(self.keep):
            if isinstance(budget, bool) or budget != 0:
                check_keep(budget, f"keep[{i}]")
        for before, after in zip(self.keep, self.keep[1:]):
            if type(before) is type(after) and after > before:
                raise ValueError(f"keep={self.keep!r} should not rise from one step to the next")

    def plan(self, facts: ModelFacts) -> Plan:
        for budget in self.keep if isinstance(self.keep, Sequence) else (self.keep,):
            check_fits(budget, facts)
        depth = facts.decoder_layers
        if max(self.prune_layers) >= depth:
            raise ValueError(
                f"prune_layers={tuple(self.prune_layers)} should lie between 1 and {depth - 1}: "
                f"the model has {depth} decoder layers and the one after each must exist"
            )
        if max(self.accumulate_layers, default=0) > depth:
            raise ValueError(
                f"accumulate_layers={tuple(self.accumulate_layers)} should lie between 1 and the "
                f"model's {depth} decoder layers"
            )
        return Plan(decoder=(_TransPruneStage(self),))

    def counts(self, step: int, tokens: int) -> int:
        """Tokens left after prune step ``step`` (0-based) of an image that entered with
        ``tokens``."""
        if isinstance(self.keep, Sequence):
            return _resolve(self.keep[step], tokens)
        if len(self.prune_layers) == 1:
            return _resolve(self.keep, tokens)
        part, whole = _SHARES[step]
        if isinstance(self.keep, int):
            return tokens - max(0, tokens - self.keep) * part // whole
        return int(tokens * (1 - (1 - self.keep) * part / whole))


def _resolve(budget: Budget, tokens: int) -> int:
    return min(budget, tokens) if isinstance(budget, int) else int(tokens * budget)


def _check_layers(layers: Sequence[int], name: str) -> None:
    fine = isinstance(layers, Sequence) and all(
        isinstance(x, int) and not isinstance(x, bool) for x in layers
    )
    if not fine or any(x < 1 for x in layers) or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"{name}={layers!r} should be a sequence of layer numbers, counted from 1 and ascending"
        )


class _TransPruneStage(DecoderStage):
    def __init__(self, method: TransPrune) -> None:
        self.method = method
        self.prune_layers = frozenset(method.prune_layers)
        if method.alpha > 0:
            last = max(method.prune_layers)
            self.transition_layers = frozenset(
                layer - 1 for layer in method.accumulate_layers if layer <= last
            )

    def start(self) -> DecoderRun:
        return _TransPruneRun(self.method)


class _TransPruneRun(DecoderRun):
    def __init__(self, method: TransPrune) -> None:
        self.method = method
        #: transition weights [B, L] per 0-based layer, tokens alive now
        self.transitions: dict[int, Tensor] = {}
        #: instruction attention and combined score [B, L] of the newest step, before its drop
        self.instruction: Tensor | None = None
        self.score: Tensor | None = None
        self._warned = False

    def transition(
        self, layer: int, module: Literal["attention", "mlp"], before: Tensor, after: Tensor,
        sequence: SequenceView,
    ) -> None:  # fmt: skip
        valid = sequence.valid if sequence.padded else None
        weight = transition_weight(
            before, after, valid, self.method.normalize, self.method.direction
        )
        earlier = self.transitions.get(layer)
        self.transitions[layer] = weight if earlier is None else earlier + weight

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        method = self.method
        step = list(method.prune_layers).index(layer)
        counts = [
            [min(method.counts(step, n), now) for n, now in zip(*row)]
            for row in zip(sequence.entering, sequence.counts)
        ]
        ttv = [weight.to(hidden.device) for weight in self.transitions.values()]
        self.instruction = self._instruction(hidden, sequence, scoring)
        if not ttv:  # attention alone ranks; samples without instruction stay as they are
            counts = [
                own if rows else now
                for own, now, rows in zip(counts, sequence.counts, sequence.text_after)
            ]
            if self.instruction is None:
                return None
        self.score = transition_score(
            ttv, self.instruction, method.alpha, sequence.segment, sequence.segments
        )
        width = sequence.segments
        budget = torch.tensor([own + [0] * (width - len(own)) for own in counts])
        mask = segment_topk(
            self.score, sequence.segment, budget.to(hidden.device, non_blocking=True)
        )
        return KeepDecision(mask, counts, method.positions)

    def _instruction(
        self, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> Tensor | None:
        """Attention that the text after the last image pays to each image token, [B, L]."""
        if self.method.alpha == 1:
            return None
        if not self._warned and any(
            any(own) and not rows for own, rows in zip(sequence.counts, sequence.text_after)
        ):
            self._warned = True
            warnings.warn(
                "TransPrune: a prompt has no text after its last image, so nothing says what to "
                "look for; its tokens are ranked by transitions alone"
                if self.transitions
                else "TransPrune: a prompt has no text after its last image and no transitions "
                "were accumulated; its tokens are not pruned here",
                stacklevel=2,
            )
        rows, real = sequence.text_rows()
        if not rows.shape[1]:
            return None
        probabilities = scoring.probabilities(hidden, rows, sequence)
        return instruction_rows(probabilities, real, sequence.segment, sequence.segments)

    def dropped(self, layer: int, index: Tensor) -> None:
        # Padding gathers some token's weight; outside the images it counts for nothing.
        self.transitions = {
            number: weight.gather(1, index.to(weight.device))
            for number, weight in self.transitions.items()
        }
