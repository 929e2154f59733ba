"""PyramidDrop: drop a fixed share of the image tokens at the end of every decoder stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

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
from tokprune.methods.base import BudgetSchedule, Method, Preset, check_choice, register_method
from tokprune.methods.schedule import check_layers, check_steps, check_steps_fit, tokens_after
from tokprune.operators.pyramiddrop import rank_drop

_LAYERS = (8, 16, 24)
_EARLY = (2, 8, 16)
_SOURCE = "PyramidDrop, arXiv 2410.17247, default of paper and code: 4 stages, half each time"
_THREE = "PyramidDrop, ablation with 3 stages; layers inferred from the printed 2.13 TFLOPs"
_FITTED = (
    "ours: no official setting has this average over 32 layers; equal shares per stage, fitted on "
    "the published layers"
)
_FITTED_EARLY = (
    "ours: no official setting has this average over 32 layers, and a first quarter of all tokens "
    "is too much for it; equal shares per stage, fitted on earlier layers"
)


def _shares(share: float) -> tuple[float, float, float]:
    return share, share**2, share**3


@register_method
@dataclass(frozen=True)
class PyramidDrop(Method):
    """At the end of every stage of decoder layers a fixed share of the image tokens survives:
    those that the last prompt token attends to most. The attention is that of the layer about to
    run (its norm, query and key projections on what enters it). Prefill only; decode steps drop
    nothing.

    Every image has its own budget (official code: one image per sample).

    Args:
        keep: tokens per image left after each stage, a count or fraction per prune layer;
            fractions are of the tokens that entered the decoder, int(n · fraction), at least 1.
            One number is the last stage: every stage then keeps the same share of what it finds
            (0.125 in three steps is the published 0.5, 0.25, 0.125).
        prune_layers: decoder layers, counted from 0 and ascending, before which tokens are
            dropped.
        positions: "compact" renumbers after every drop (official), "preserve" keeps the ids.

    Source: PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
    Redundancy Reduction, CVPR 2025, arXiv 2410.17247. The paper ranks by the stage's last layer,
    the official code by the layer that follows; this is the code's.
    """

    name: ClassVar[str] = "pyramiddrop"
    stages: ClassVar[tuple[str, ...]] = ("decoder prefill",)
    needs: ClassVar[str] = "one attention row of three layers"
    paper: ClassVar[str] = "arXiv 2410.17247"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset("llava-1.5", "S=4", {"keep": (0.5, 0.25, 0.125)}, _SOURCE),
        Preset("llava-1.5", "S=3", {"keep": (0.5, 0.25), "prune_layers": (10, 20)}, _THREE),
        Preset("llava-1.5", 192, {"keep": _shares(0.25308)}, _FITTED),
        Preset("llava-1.5", 128, {"keep": _shares(0.41974), "prune_layers": _EARLY}, _FITTED_EARLY),
        Preset("llava-1.5", 64, {"keep": _shares(0.19158), "prune_layers": _EARLY}, _FITTED_EARLY),
        Preset("llava-next", "S=4", {"keep": (0.5, 0.25, 0.125)}, _SOURCE),
        Preset(
            "llava-next", 640, {"keep": _shares(0.41974), "prune_layers": _EARLY}, _FITTED_EARLY
        ),
        Preset(
            "llava-next", 320, {"keep": _shares(0.19158), "prune_layers": _EARLY}, _FITTED_EARLY
        ),
    )

    keep: BudgetSchedule = 0.125
    prune_layers: Sequence[int] = _LAYERS
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        check_layers(self.prune_layers, "prune_layers", first=1)
        check_steps(self.keep, len(self.prune_layers), "prune_layers")
        check_choice(self.positions, "positions", ("compact", "preserve"))

    def plan(self, facts: ModelFacts) -> Plan:
        check_steps_fit(self.keep, facts)
        if max(self.prune_layers) >= facts.decoder_layers:
            raise ValueError(
                f"prune_layers={tuple(self.prune_layers)} should lie between 1 and "
                f"{facts.decoder_layers - 1}, the last of the model's decoder layers"
            )
        return Plan(decoder=(_PyramidStage(self),))

    def counts(self, step: int, tokens: int) -> int:
        """Tokens left after step ``step`` (0-based) of an image that entered with ``tokens``."""
        return tokens_after(self.keep, step, len(self.prune_layers), tokens)


class _PyramidStage(DecoderStage):
    def __init__(self, method: PyramidDrop) -> None:
        self.method = method
        self.prune_layers = frozenset(method.prune_layers)

    def start(self) -> DecoderRun:
        return _PyramidRun(self.method)


class _PyramidRun(DecoderRun):
    def __init__(self, method: PyramidDrop) -> None:
        self.method = method
        #: attention from the last prompt token at the newest step, [B, L], before its drop
        self.score: Tensor | None = None

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        step = list(self.method.prune_layers).index(layer)
        counts = [
            [min(self.method.counts(step, n), now) for n, now in zip(*row)]
            for row in zip(sequence.entering, sequence.counts)
        ]
        if counts == sequence.counts:
            return None
        row = scoring.probabilities(hidden, sequence.last_row(), sequence)[:, :, 0]
        budget = torch.tensor([own + [0] * (sequence.segments - len(own)) for own in counts])
        self.score, mask = rank_drop(
            row, sequence.segment, budget.to(hidden.device, non_blocking=True)
        )
        return KeepDecision(mask, counts, self.method.positions)
