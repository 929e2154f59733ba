"""FastV: drop the image tokens that the last prompt token attends to least, after layer K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tokprune.engine.contracts import Attention, SequenceView
from tokprune.methods.base import Preset
from tokprune.methods.decoder_rows import asking_rows
from tokprune.methods.depth import first_layers
from tokprune.methods.options import Renamed
from tokprune.methods.registry import register_method
from tokprune.methods.scoring import DecoderScorer
from tokprune.operators.attention import mean_rows

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
class FastV(DecoderScorer):
    """Attention of the last prompt token in layer K−1 ranks the image tokens; layers ≥ K see the
    best ``keep`` of them. Selection happens once, in prefill.

    With several images in a prompt all their tokens share one ranking and the summed budget, except
    with ``video_unit`` other than "video": then every part of a video has a ranking of its own, and
    so has every image.

    Args:
        keep: visual tokens per image after the cut (count), or fraction.
        prune_before: K, 0-based, the number of decoder layers that see all tokens (paper 2, Hugging
            Face demo 3). With several, every one drops in the same way.
        rows: "last" prompt row (all official code), or the mean over all "text" rows after the
            image (another reading of the paper; the last row where no text follows).
        positions: "preserve" (official) or "compact".

    Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764.
    """

    name = "fastv"
    needs = "one attention row of one layer"
    paper = "arXiv 2403.06764"
    reads_prompt = True
    presets = (
        Preset("llava-1.5", 192, {"keep": 166, "prune_before": 2}, _SPARSEVLM),
        Preset("llava-1.5", 128, {"keep": 98, "prune_before": 2}, _SPARSEVLM),
        Preset("llava-1.5", 64, {"keep": 30, "prune_before": 2}, _SPARSEVLM),
        Preset("llava-1.5", "R=25%", {"keep": 432, "prune_before": 2}, _README),
        Preset("llava-1.5", "R=50%", {"keep": 288, "prune_before": 2}, _README),
        Preset("llava-1.5", "R=75%", {"keep": 144, "prune_before": 2}, _README),
        Preset("llava-1.5", "R=87.5%", {"keep": 72, "prune_before": 2}, _ABLATION),
        Preset("llava-1.5", "K=3 R=50%", {"keep": 288, "prune_before": 3}, _LMMS),
        Preset("llava-next", 640, {"keep": 640, "prune_before": 2}, _QUOTED),
        Preset("llava-next", 320, {"keep": 320, "prune_before": 2}, _QUOTED),
        Preset("llava-next", 160, {"keep": 160, "prune_before": 2}, _QUOTED),
    )

    variants = ({"rows": "text"},)
    renamed = (Renamed("layer", "prune_before"),)

    rows: Rows = "last"

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        return first_layers(decoder_layers)

    @property
    def ranked_together(self) -> bool:
        return self.video_unit == "video"

    def score(self, attention: Attention, sequence: SequenceView) -> Tensor:
        if self.rows == "last":
            return mean_rows(attention.rows(sequence.last_row()))
        rows, real = asking_rows(sequence)
        return mean_rows(attention.rows(rows), real)
