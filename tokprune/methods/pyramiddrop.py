"""PyramidDrop: drop a fixed share of the image tokens at the end of every decoder stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokprune.engine.contracts import Attention, Positions, SequenceView
from tokprune.methods.base import Preset
from tokprune.methods.depth import last_steps
from tokprune.methods.options import BudgetSchedule, PruneBefore, Renamed
from tokprune.methods.registry import register_method
from tokprune.methods.scoring import DecoderScorer

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
class PyramidDrop(DecoderScorer):
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
        prune_before: decoder layers, counted from 0 and ascending, before which tokens are
            dropped.
        positions: "compact" renumbers after every drop (official), "preserve" keeps the ids.

    Source: PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
    Redundancy Reduction, CVPR 2025, arXiv 2410.17247. The paper ranks by the stage's last layer,
    the official code by the layer that follows; this is the code's.
    """

    name = "pyramiddrop"
    needs = "one attention row of three layers"
    paper = "arXiv 2410.17247"
    reads_prompt = True
    presets = (
        Preset("llava-1.5", "S=4", {"keep": (0.5, 0.25, 0.125)}, _SOURCE),
        Preset("llava-1.5", "S=3", {"keep": (0.5, 0.25), "prune_before": (10, 20)}, _THREE),
        Preset("llava-1.5", 192, {"keep": _shares(0.25308)}, _FITTED),
        Preset("llava-1.5", 128, {"keep": _shares(0.41974), "prune_before": _EARLY}, _FITTED_EARLY),
        Preset("llava-1.5", 64, {"keep": _shares(0.19158), "prune_before": _EARLY}, _FITTED_EARLY),
        Preset("llava-next", "S=4", {"keep": (0.5, 0.25, 0.125)}, _SOURCE),
        Preset(
            "llava-next", 640, {"keep": _shares(0.41974), "prune_before": _EARLY}, _FITTED_EARLY
        ),
        Preset(
            "llava-next", 320, {"keep": _shares(0.19158), "prune_before": _EARLY}, _FITTED_EARLY
        ),
    )

    renamed = (Renamed("prune_layers", "prune_before"),)
    published_positions = "compact"
    attention_of = "next layer"

    keep: BudgetSchedule = 0.125
    prune_before: PruneBefore = _LAYERS
    positions: Positions | None = None

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        return last_steps(_LAYERS, decoder_layers)

    def score(self, attention: Attention, sequence: SequenceView) -> Tensor:
        return attention.rows(sequence.last_row())[:, :, 0].mean(1)
