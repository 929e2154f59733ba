"""PriorTR: drop the image tokens that the question looks at no more than anything else would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor

from tokprune.engine.contracts import Attention, ModelFacts, Plan, SequenceView
from tokprune.methods.base import Preset
from tokprune.methods.depth import first_layers
from tokprune.methods.earlier_caches import CacheCuttingScorer
from tokprune.methods.options import PruneBefore, Range
from tokprune.methods.priortr_stage import PriorTRStage, prior_attention, question_attention
from tokprune.methods.registry import register_method
from tokprune.operators.priortr import prior_corrected

Queries = Literal["question", "but_last", "last"]
Heads = Literal["mean", "max"]

_LAYERS = 3


def _preset(
    model: str, budget: int | str, keep: int | float, queries: Queries, mean: str
) -> Preset:
    source = f"PriorTR README: tokens after layer 3; mean over the decoder's layers {mean}"
    return Preset(
        model, budget, {"keep": keep, "queries": queries, "cut_earlier_caches": True}, source
    )


@register_method
@dataclass(frozen=True)
class PriorTR(CacheCuttingScorer):
    """Ranks image tokens by P · log(P / Q): P is their share of the question's attention, Q that of
    the null row's, the first text after the image, which sees the image and nothing of the
    question. Selection happens once, in prefill.

    Every image has its own budget, shares and null row; the question is the text after the last
    image. Where fewer than two tokens of text follow that image, nothing behind the null row asks:
    the prompt keeps all its tokens, with a warning. A null row that has seen the question, because
    it stands before the image, tells nothing either; a prompt that looks like it (at most 8 tokens
    of text after its last image, and more before) brings a warning as well. Where a decoder sees
    its prompt both ways (PaliGemma), every row has seen the question.

    Args:
        keep: visual tokens per image after the cut (count), or fraction.
        prune_before: decoder layer, 0-based, before which tokens are dropped, by the attention of
            the layer before it (README 3, paper 2). With several, every one drops in the same way.
        positions: "preserve" (official) or "compact".
        cut_earlier_caches: drop the tokens from the caches of the layers before the cut, too
            (official): answers then see none of them.
        queries: whose attention P is: the mean of all rows after the image, null row and end of the
            template included ("question", official for LLaVA-1.5); the same without the prompt's
            last row ("but_last", official for Qwen, the last row where fewer than two are left);
            or the "last" row (official for LLaVA-NeXT).
        heads: "mean" or "max" over the heads, after the mean over rows.
        score_threshold: of the tokens that ``keep`` allows, only those of a higher score stay, at
            least one of each image (official with all allowed; 0: looked at more than the prior
            does). The host reads back how many.

    Source: Accelerating MLLMs with Prior-Corrected Token Reduction, ECCV 2026, arXiv 2606.24156.
    """

    name = "priortr"
    needs = "attention of the text after the image in one layer"
    paper = "arXiv 2606.24156"
    reads_prompt = True
    adaptive = "score_threshold, if given"
    presets = (
        _preset("llava-1.5", 192, 192, "question", "228 of 576"),
        _preset("llava-1.5", 128, 128, "question", "170 of 576"),
        _preset("llava-1.5", 64, 64, "question", "112 of 576"),
        _preset("llava-next", 320, 320, "last", "560 of 2880"),
        _preset("qwen2-vl", "1/3", 1 / 3, "but_last", "40.5 %"),
        _preset("qwen2-vl", "2/9", 2 / 9, "but_last", "30.6 %"),
        _preset("qwen2-vl", "1/9", 1 / 9, "but_last", "20.6 %"),
    )
    variants = ({"queries": "last"},)

    prune_before: PruneBefore = _LAYERS
    queries: Queries = "question"
    heads: Heads = "mean"
    score_threshold: Annotated[float, Range(-1e6, 1e6)] | None = None

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        return first_layers(decoder_layers, _LAYERS)

    def plan(self, facts: ModelFacts) -> Plan:
        super().plan(facts)  # refuses what does not fit
        return Plan(decoder=(PriorTRStage(self, facts),))

    def score(self, attention: Attention, sequence: SequenceView) -> Tensor:
        question = question_attention(attention, sequence, self.queries, self.heads)
        prior = prior_attention(attention, sequence, self.heads)
        return prior_corrected(question, prior, sequence.segment, sequence.segments)
