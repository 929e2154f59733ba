"""DART: after K layers, keep the image tokens that least duplicate a few pivot tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
from tokprune.operators.dart import PivotOrder, Retained, dart, key_norms

_LLAVA = "DART, arXiv 2502.11494, LLaVA-1.5: 4 pivots beside the {} that its script asks for, K = 2"
_NEXT = "DART, arXiv 2502.11494, LLaVA-NeXT: 4 pivots beside 8 × 40 tokens, K = 2"


@register_method
@dataclass(frozen=True)
class DART(Method):
    """Pivots are the image tokens, and the text tokens after the image, of the largest keys (‖k‖₁
    after rotary) in layer K−1. Image pivots stay; every pivot then takes the image tokens least
    similar to it that are still free (cosine of layer K−1's output under the decoder's final
    norm). Layers ≥ K see the result. Selection happens once, in prefill; no attention is read.

    Every image of a prompt is reduced on its own; newline tokens compete with its patches, and
    the text after an image leaves later images out. A budget that the pivots do not divide evenly
    gives one more token to the first of them, where the official code falls short of it.

    Args:
        keep: visual tokens per image after the cut, image pivots included (count), or fraction.
        layer: K, the number of decoder layers that see all tokens.
        image_pivots, text_pivots: how many of each.
        pivot_order: in which pivots choose, as no token is taken twice. "official" iterates a
            CPython set of the pivots' places in the prompt, as the published code does, and
            copies 8 numbers per image to the host; "norm" takes image pivots first, then text
            pivots, each by falling norm, and reads nothing back.
        positions: "preserve" (official) or "compact".

    Source: Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models:
    Duplication Matters More", EMNLP 2025, arXiv 2502.11494.
    """

    name: ClassVar[str] = "dart"
    stages: ClassVar[tuple[str, ...]] = ("decoder prefill",)
    needs: ClassVar[str] = "keys and output of one decoder layer"
    paper: ClassVar[str] = "arXiv 2502.11494"
    presets: ClassVar[tuple[Preset, ...]] = (
        *(Preset("llava-1.5", n, {"keep": n + 4}, _LLAVA.format(n)) for n in (192, 128, 64)),
        Preset("llava-next", 320, {"keep": 324}, _NEXT),
    )

    keep: Budget
    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4
    pivot_order: PivotOrder = "official"
    positions: Positions = "preserve"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name, least in (("layer", 1), ("image_pivots", 1), ("text_pivots", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} should be a whole number, at least {least}")
        check_choice(self.pivot_order, "pivot_order", ("official", "norm"))
        check_choice(self.positions, "positions", ("compact", "preserve"))

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        check_cut(self.layer, facts)
        return Plan(decoder=(OneCut(self.layer, lambda: _DARTRun(self)),))


class _DARTRun(DecoderRun):
    def __init__(self, method: DART) -> None:
        self.method = method
        self.norms: Tensor | None = None
        #: pivots and selection of this prefill, on the places of the sequence that met layer K
        self.retained: Retained | None = None

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        self.norms = key_norms(attention.key[:, :, attention.past :])

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        method, device = self.method, hidden.device
        budgets = [[resolve_keep(method.keep, n) for n in row] for row in sequence.entering]
        budgets = [
            [min(k, n) for k, n in zip(row, now)] for row, now in zip(budgets, sequence.counts)
        ]
        if self.norms is None or budgets == sequence.counts:
            return None
        most = sequence.segments
        wanted = torch.tensor([row + [0] * (most - len(row)) for row in budgets])
        number = torch.arange(most, device=device)
        image = sequence.segment[:, None, :] == number[:, None]
        arange = torch.arange(hidden.shape[1], device=device)
        last = torch.where(image, arange, -1).amax(-1, keepdim=True)
        text = (sequence.valid & ~sequence.visual)[:, None, :] & (arange > last) & (last >= 0)
        self.retained = dart(
            self.norms.to(device),
            scoring.final_norm(hidden),
            image,
            text,
            wanted.to(device, non_blocking=True),
            method.image_pivots,
            method.text_pivots,
            method.pivot_order,
            sequence.valid.cumsum(1) - 1,  # padding at the left does not count
        )
        return KeepDecision(self.retained.mask.any(1), budgets, method.positions)
