"""DART: after K layers, keep the image tokens that least duplicate a few pivot tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokprune.engine.contracts import (
    Attention,
    DecoderRun,
    DecoderStage,
    KeepDecision,
    ModelFacts,
    Plan,
    Positions,
    ScoringLayer,
    SequenceView,
)
from tokprune.methods.base import Method, Preset, check_fits, check_layers_fit, resolve_keep
from tokprune.methods.depth import first_layers
from tokprune.methods.options import AtLeast, Budget, Renamed
from tokprune.methods.registry import register_method
from tokprune.methods.schedule import mean_of_steps
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
        prune_before: K, 0-based, the number of decoder layers that see all tokens.
        image_pivots, text_pivots: how many of each.
        pivot_order: in which pivots choose, as no token is taken twice. "official" iterates a
            CPython set of the pivots' places in the prompt, as the published code does, and
            copies 8 numbers per image to the host; "norm" takes image pivots first, then text
            pivots, each by falling norm, and reads nothing back.
        centre: "plain" compares tokens around the mean of their image's ("Centering before
            Pruning", arXiv 2608.30263; ours for DART); "none" as DART itself.
        positions: "preserve" (official) or "compact".

    Source: Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models:
    Duplication Matters More", EMNLP 2025, arXiv 2502.11494.
    """

    name = "dart"
    stages = ("decoder prefill",)
    needs = "keys and output of one decoder layer"
    paper = "arXiv 2502.11494"
    reads_prompt = "text pivots"
    presets = (
        *(Preset("llava-1.5", n, {"keep": n + 4}, _LLAVA.format(n)) for n in (192, 128, 64)),
        Preset("llava-next", 320, {"keep": 324}, _NEXT),
    )
    variants = ({"pivot_order": "norm"}, {"centre": "plain"})
    published_positions = "preserve"
    renamed = (Renamed("layer", "prune_before"),)

    keep: Budget
    prune_before: Annotated[int, AtLeast(1)] = 2
    image_pivots: Annotated[int, AtLeast(1)] = 4
    text_pivots: Annotated[int, AtLeast(0)] = 4
    pivot_order: PivotOrder = "official"
    centre: Literal["none", "plain"] = "none"
    positions: Positions | None = None

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        return first_layers(decoder_layers)

    def mean_tokens(self, tokens: int, layers: int) -> float | None:
        after = lambda step, now: resolve_keep(self.keep, now)  # noqa: E731
        return mean_of_steps(tokens, (self.prune_before,), layers, after)

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        check_layers_fit(self.prune_before, facts, first=1)
        return Plan(decoder=(_DARTStage(self),))


class _DARTStage(DecoderStage):
    def __init__(self, method: DART) -> None:
        self.method, self.positions = method, method.new_positions
        self.taps = frozenset({method.prune_before - 1})
        self.prune_before = frozenset({method.prune_before})

    ahead = frozenset()

    def start(self) -> DecoderRun:
        return _DARTRun(self.method)


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
        counts = sequence.counts_after(lambda tokens: resolve_keep(method.keep, tokens))
        if counts == sequence.counts:
            return None
        assert self.norms is not None
        budget = pad_sequence([torch.tensor(row, dtype=torch.long) for row in counts], True)
        image = sequence.segment[:, None] == torch.arange(sequence.segments, device=device)[:, None]
        place = torch.arange(hidden.shape[1], device=device)
        last = torch.where(image, place, -1).amax(-1, keepdim=True)
        text = (sequence.valid & ~sequence.visual)[:, None] & (place > last) & (last >= 0)
        self.retained = dart(
            self.norms.to(device),
            scoring.final_norm(hidden),
            image,
            text,
            budget.to(device, non_blocking=True),
            method.image_pivots,
            method.text_pivots,
            method.pivot_order,
            sequence.valid.cumsum(1) - 1,  # padding at the left does not count
            method.centre == "plain",
        )
        return KeepDecision(self.retained.mask.any(1), counts, method.new_positions)
