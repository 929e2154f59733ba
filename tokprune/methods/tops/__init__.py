"""TOPS: sets of tokens that are relevant, diverse and cover the others, chosen in three steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from tokprune.engine.contracts import Attention, ModelFacts, Plan, SequenceView
from tokprune.methods.base import check_fits
from tokprune.methods.decoder_rows import asking_rows, mean_attention
from tokprune.methods.options import Range
from tokprune.methods.registry import register_method
from tokprune.methods.scoring import SelectorStage
from tokprune.methods.tops.budgets import NominalBudget
from tokprune.methods.tops.presets import PRESETS
from tokprune.methods.tops.stages import InputSet, SetStage
from tokprune.methods.tower_attention import PatchAttention, read_layer
from tokprune.operators.tops import Normalise

Weight = Annotated[float, Range(0)]


@register_method
@dataclass(frozen=True)
class TOPS(NominalBudget):
    """One greedy choice, made three times: the most relevant token first, then always the one with
    the largest sum of relevance, distance to the nearest chosen token and coverage of the tokens
    not chosen, each brought to a common scale. At the language-model input, over all tiles of an
    image together, relevance is the class token's attention at the layer the model reads; at two
    cuts inside the decoder it is the attention of the text behind the image in the layer before
    the cut. Newline tokens go at the input. Once everything is covered, rounding is all that is
    left of that criterion: where most tokens stay, the last of them may differ between kernels.

    There is no official code; ours are: cosine as the similarity, means over heads, the cut after
    12 and 24 full layers, all tiles in one choice, prompt order of what stays, and ``raters``.

    Args:
        keep: the nominal T, visual tokens per image (count; all its tiles together), or fraction
            of its patches: 2·T enter the decoder, T are left after its first cut and T/4 after its
            second, 1.19·T on the mean over the layers as published. With one layer of
            ``prune_before`` T is left after it. Or the budgets after each cut, one per layer.
        prune_before: decoder layers, counted from 0, before which tokens are dropped.
        input_keep: what enters the decoder, a count, or fraction of an image's patches; 1.0: all,
            and the vision encoder is not looked at. None: twice ``keep``, or the first of several.
        alpha, lam: weights of diversity and of coverage against relevance at the input.
        decoder_alpha, decoder_lam: the same inside the decoder.
        normalise: a criterion is divided by its "mean" over the candidates of a step (the paper's
            algorithms), or stretched to [0, 1] ("minmax", its text).
        raters: "all" text tokens behind the image, the "last" token of the prompt, or those that
            SparseVLM's rule chooses on the embedded prompt ("sparsevlm").
        positions: "compact" renumbers after every step (the paper), "preserve" keeps the ids. None:
            renumber at the input, keep the ids inside the decoder.

    Source: "TOPS: First-Principles Visual Token Pruning via Constructing Token Optimal Preservation
    Sets", arXiv 2606.27161v1.
    """

    name = "tops"
    stages = ("after projector", "decoder prefill")
    needs = "class-token attention, features, text attention of two decoder layers"
    paper = "arXiv 2606.27161v1"
    source = "paper's equations"
    reads_prompt = "the cuts inside the decoder"
    without_class_token = "the mean attention that a patch receives stands in for the class token's"
    without_tower = ({"input_keep": 1.0},)
    presets = PRESETS
    variants = ({"normalise": "minmax"}, {"raters": "last"})

    alpha: Weight = 0.5
    lam: Weight = 0.5
    decoder_alpha: Weight = 0.5
    decoder_lam: Weight = 0.5
    normalise: Normalise = "mean"
    raters: Literal["all", "last", "sparsevlm"] = "all"

    def on(self, facts: ModelFacts) -> TOPS:
        return super().on(facts) if facts.axes > 1 else self  # None: see ``plan``

    def plan(self, facts: ModelFacts) -> Plan:
        super().plan(facts)  # checks
        if isinstance(self.input_keep, float) and self.input_keep == 1:
            return Plan(decoder=(SetStage(self),))
        tower = facts.need_tower(self.name, whole=False)
        if self.input_keep is not None:
            check_fits(self.input_keep, facts, name="input_keep")
        entry = InputSet(
            self.entering, self.positions or "compact", self.alpha, self.lam, self.normalise,
            video_unit=self.video_unit,
        )  # fmt: skip
        return Plan(
            encoder=(PatchAttention(read_layer(tower)),),
            prompt=(SelectorStage(entry),),
            decoder=(SetStage(self),),
        )

    def score(self, attention: Attention, sequence: SequenceView) -> Tensor:
        rows, real = asking_rows(sequence)
        if self.raters == "last":
            rows, real = sequence.last_row(), real.any(1, keepdim=True)
        return mean_attention(attention, rows, real)
