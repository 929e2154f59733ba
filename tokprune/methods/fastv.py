"""FastV: drop the image tokens that the last prompt token attends to least, after layer K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    DecoderRun,
    KeepDecision,
    ModelFacts,
    Plan,
    Positions,
    ScoringLayer,
    SequenceView,
)
from tokprune.methods.base import (
    Budget,
    Method,
    Preset,
    check_choice,
    check_fits,
    check_keep,
    register_method,
    resolve_keep,
)
from tokprune.methods.one_cut import OneCut, check_cut
from tokprune.operators.attention import mean_rows
from tokprune.operators.topk import segment_topk

Rows = Literal["last", "text"]

_SPARSEVLM = "average over 32 layers, K = 2: k = (32·avg − 2·576)/30"
_README = "FastV README, latency table: K = 2"
_ABLATION = "FastV, arXiv 2403.06764, ablation: K = 2"
_LMMS = "FastV README, lmms-eval table: K = 3"
_QUOTED = (
    "as quoted by later papers for 2880 tokens, K = 2: tokens after the cut (they do not say "
    "whether it is that or the average over layers)"
)


@register_method
@dataclass(frozen=True)
class FastV(Method):
    """Attention of the last prompt token in layer K−1 ranks the image tokens; layers ≥ K see the
    best ``keep`` of them. Selection happens once, in prefill.

    With several images in a prompt all their tokens share one ranking and the summed budget, except
    with ``video_unit`` other than "video": then every part of a video has a ranking of its own, and
    so has every picture.

    Args:
        keep: visual tokens per image after the cut (count), or fraction.
        layer: K, the number of decoder layers that see all tokens (paper 2, Hugging Face demo 3).
        rows: "last" prompt row (all official code), or the mean over all "text" rows after the
            image (another reading of the paper; the last row where no text follows).
        positions: "preserve" (official) or "compact".

    Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764.
    """

    name: ClassVar[str] = "fastv"
    stages: ClassVar[tuple[str, ...]] = ("decoder prefill",)
    needs: ClassVar[str] = "one attention row of one layer"
    paper: ClassVar[str] = "arXiv 2403.06764"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset("llava-1.5", 192, {"keep": 166, "layer": 2}, _SPARSEVLM),
        Preset("llava-1.5", 128, {"keep": 98, "layer": 2}, _SPARSEVLM),
        Preset("llava-1.5", 64, {"keep": 30, "layer": 2}, _SPARSEVLM),
        Preset("llava-1.5", "R=25%", {"keep": 432, "layer": 2}, _README),
        Preset("llava-1.5", "R=50%", {"keep": 288, "layer": 2}, _README),
        Preset("llava-1.5", "R=75%", {"keep": 144, "layer": 2}, _README),
        Preset("llava-1.5", "R=87.5%", {"keep": 72, "layer": 2}, _ABLATION),
        Preset("llava-1.5", "K=3 R=50%", {"keep": 288, "layer": 3}, _LMMS),
        Preset("llava-next", 640, {"keep": 640, "layer": 2}, _QUOTED),
        Preset("llava-next", 320, {"keep": 320, "layer": 2}, _QUOTED),
        Preset("llava-next", 160, {"keep": 160, "layer": 2}, _QUOTED),
    )

    keep: Budget
    layer: int = 2
    rows: Rows = "last"
    positions: Positions = "preserve"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.layer < 1:
            raise ValueError(
                f"layer={self.layer} should be at least 1: the layer before it gives the scores"
            )
        check_choice(self.rows, "rows", ("last", "text"))
        check_choice(self.positions, "positions", ("compact", "preserve"))

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        check_cut(self.layer, facts)
        return Plan(decoder=(OneCut(self.layer, lambda: _FastVRun(self)),))


class _FastVRun(DecoderRun):
    def __init__(self, method: FastV) -> None:
        self.method = method
        self.score: Tensor | None = None

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        if self.method.rows == "last":
            self.score = mean_rows(attention.rows(sequence.last_row()))
            return
        rows, real = sequence.text_rows()
        if not min(sequence.text_after):  # without text after the image, the last row stands in
            rows = torch.cat([rows, sequence.last_row()], dim=1)
            real = torch.cat([real, ~real.any(1, keepdim=True)], dim=1)
        self.score = mean_rows(attention.rows(rows), real)

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        if self.score is None:
            return None
        budgets = [[resolve_keep(self.method.keep, n) for n in row] for row in sequence.entering]
        budgets = [
            [min(k, n) for k, n in zip(row, now)] for row, now in zip(budgets, sequence.counts)
        ]
        if self.method.video_unit != "video":
            width = sequence.segments
            own = torch.tensor([row + [0] * (width - len(row)) for row in budgets])
            mask = segment_topk(
                self.score.to(hidden.device),
                sequence.segment,
                own.to(hidden.device, non_blocking=True),
            )
            return KeepDecision(mask, budgets, self.method.positions)
        totals = torch.tensor([[sum(row)] for row in budgets])
        one = torch.where(sequence.visual, 0, -1)  # all images of a row share one ranking
        mask = segment_topk(
            self.score.to(hidden.device), one, totals.to(hidden.device, non_blocking=True)
        )
        shared = any(len(row) > 1 and row != now for row, now in zip(budgets, sequence.counts))
        return KeepDecision(mask, None if shared else budgets, self.method.positions)
