"""CLSE: drop image tokens by the change of their fine detail and by attention, in three cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor

from tokprune.engine.contracts import Attention, ModelFacts, Plan, SequenceView
from tokprune.methods.base import Preset, resolve_keep
from tokprune.methods.clse_stage import CLSEStage
from tokprune.methods.depth import last_steps
from tokprune.methods.earlier_caches import CacheCuttingScorer
from tokprune.methods.options import PruneBefore, Range
from tokprune.methods.registry import register_method
from tokprune.methods.schedule import tokens_after

FirstCut = Literal["clse_attn", "clse", "attn"]

_LAYERS = (1, 11, 21)
_QWEN = (1, 10, 19)
#: tokens after each cut, whose proportions one number of ``keep`` takes
_PUBLISHED = (330, 210, 62)


def _preset(
    model: str, budget: int | float, keep: tuple[float, ...], mean: str,
    layers: tuple[int, ...] = _LAYERS,
) -> Preset:  # fmt: skip
    source = (
        f"CLSE, official schedule for a mean of {budget} that leaves out the first layer; mean "
        f"over all of the decoder's layers {mean}"
    )
    options = {"keep": keep, "prune_before": layers, "cut_earlier_caches": True}
    return Preset(model, budget, options, source)


@register_method
@dataclass(frozen=True)
class CLSE(CacheCuttingScorer):
    """Before each layer of ``prune_before`` those image tokens go that the last prompt token
    attends to least in the layer before it. At the first cut that attention counts times a factor:
    how much the layer has changed the token's high spatial frequencies, against its image's other
    tokens. Prefill only.

    Every image has its own budget and its own statistics, over all its tiles or frames; each of
    these is filtered on its own grid, as far as it shows the image and not padding. Tokens on no
    grid, as newlines, take the factor of a token that changes as all others do, ½. The first cut
    needs whole images: behind a method that drops or merges before the decoder it is refused,
    except with ``first_cut="attn"``.

    Args:
        keep: tokens per image left after each cut, a count or fraction for each; fractions are of
            the tokens that entered the decoder. One number is the last cut's: with three cuts the
            others then keep the published multiples of it (330 : 210 : 62, at most all tokens),
            else every cut the same share of what it finds.
        prune_before: decoder layers, 0-based and ascending, before which tokens are dropped.
        positions: "preserve" (official) or "compact".
        cut_earlier_caches: drop the tokens from the caches of the layers before each cut, too
            (official): answers then see the last budget everywhere.
        first_cut: "clse_attn" (attention times factor), "clse" (factor alone) or "attn".
        cutoff: width of the low frequencies that do not count, as a share of the smaller half of a
            grid's height and width; 0 counts all.
        temperature: of the sigmoid that makes the factor.

    Source: CLSE: Spectral Evolution-Guided Token Pruning in MLLMs, ECCV 2026, arXiv 2606.24165.
    """

    name = "clse"
    needs = "inputs of the first two layers, one attention row of three layers"
    paper = "arXiv 2606.24165"
    reads_prompt = True
    presets = (
        _preset("llava-1.5", 192, (330, 210, 62), "208 of 576"),
        _preset("llava-1.5", 128, (220, 140, 41), "145 of 576"),
        _preset("llava-1.5", 64, (110, 70, 20), "81 of 576"),
        _preset("qwen2-vl", 0.334, (0.57, 0.36, 0.098), "0.366", _QWEN),
        _preset("qwen2-vl", 0.223, (0.38, 0.24, 0.066), "0.256", _QWEN),
        _preset("qwen2-vl", 0.112, (0.19, 0.12, 0.034), "0.146", _QWEN),
    )
    variants = ({"first_cut": "attn"},)

    prune_before: PruneBefore = _LAYERS
    first_cut: FirstCut = "clse_attn"
    cutoff: Annotated[float, Range(0)] = 0.1
    temperature: Annotated[float, Range(0, low_open=True)] = 0.1

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        return last_steps(_LAYERS, decoder_layers, ranked_before=True)

    def plan(self, facts: ModelFacts) -> Plan:
        if self.first_cut == "attn":
            return super().plan(facts)
        super().plan(facts)  # refuses what does not fit
        return Plan(decoder=(CLSEStage(self, facts),))

    def count(self, step: int, tokens: int) -> int:
        if isinstance(self.keep, Sequence) or len(self.steps) != len(_PUBLISHED) or not tokens:
            return tokens_after(self.keep, step, len(self.steps), tokens)
        last = resolve_keep(self.keep, tokens)
        return min(tokens, last * _PUBLISHED[step] // _PUBLISHED[-1])

    def score(self, attention: Attention, sequence: SequenceView) -> Tensor:
        return attention.rows(sequence.last_row())[:, :, 0].mean(1)
