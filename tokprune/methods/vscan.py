"""VScan: two scans of the encoder with merging, then a cut in the middle of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from tokprune.engine.contracts import Attention, Plan, Positions, SequenceView
from tokprune.engine.model import ModelFacts, TowerFacts
from tokprune.methods.base import Preset, check_fits, resolve_keep
from tokprune.methods.depth import last_steps
from tokprune.methods.options import AtLeast, Budget, BudgetSchedule, PruneBefore
from tokprune.methods.registry import register_method
from tokprune.methods.schedule import of_entered, tokens_after
from tokprune.methods.scoring import DecoderScorer
from tokprune.methods.tower_attention import PatchAttention, read_layer
from tokprune.methods.vscan_merge import MergingStage
from tokprune.operators.vscan import LocalShares

#: layer 5 of the 24 of CLIP ViT-L
_SHALLOW, _TOWER_DEPTH = 5, 24


@register_method
@dataclass(frozen=True)
class VScan(DecoderScorer):
    """Stage 1, at the language-model input, tile by tile: half of the budget are the tokens that a
    shallow encoder layer attends to most inside each window of the grid, the rest those that the
    layer the model reads attends to most; every other token is averaged into the most similar of
    them. Newline tokens go. Stage 2, in the middle of the decoder: the tokens that the last prompt
    token attends to most, by the attention of the layer about to run.

    Attention in the encoder is the class token's, mean over heads; in towers without one, what a
    patch receives from all patches; where the model makes one token of several patches, the mean
    of theirs. Tiles share the budget by the patches of the image that they show, the frames of a
    video equally.

    Args:
        keep: visual tokens per image that are left after stage 2 (count; all its tiles together),
            or fraction of its patches; with several layers of ``prune_before``, one for each.
        input_keep: the same after stage 1, a count where ``keep`` is one and else a fraction. None:
            three times ``keep`` (the last of several, and no less than the first): the published
            1.5 · b and 0.5 · b of an average b over the decoder's layers.
        prune_before: decoder layers, counted from 0, before which stage 2 drops.
        shallow_layer: encoder layer of the local scan. None: 5 of 24, and at that depth in others;
            the first layer that sees whole images where others see windows.
        window: cells each way of the local scan's windows. None: 6; 4 where the model makes one
            token of several patches.
        local_shares: "spread" gives each window the same, and what is left to those of the highest
            next scores (ours); "floor" loses what is left (official code for LLaVA); "limit" takes
            the highest scores of all windows, of each at most its share, rounded up (official code
            for Qwen2.5-VL). None: "limit" where the model makes one token of several patches,
            else "spread".
        positions: "compact" renumbers after every drop (official code for LLaVA), "preserve" keeps
            the ids.

    Source: "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models",
    TMLR 2026, arXiv 2505.22654. The official code for LLaVA-NeXT keeps all newline tokens; that
    for Qwen2.5-VL ranks without rotary embeddings in stage 2.
    """

    name = "vscan"
    stages = ("after projector", "decoder prefill")
    needs = "class-token attention of two encoder layers and one attention row of the decoder"
    paper = "arXiv 2505.22654"
    reads_prompt = "the cut inside the decoder"
    without_class_token = "the mean attention that a patch receives stands in for the class token's"
    presets = (
        Preset(
            "llava-1.5", 64, {"input_keep": 96, "keep": 32},
            "VScan, official code: 96 tokens, 32 from layer 16 on; 64 is their mean over 32 layers",
        ),
    )  # fmt: skip

    published_positions = "compact"
    attention_of = "next layer"
    budget_options = frozenset({"keep", "input_keep"})

    keep: BudgetSchedule
    prune_before: PruneBefore = 16
    positions: Positions | None = None
    input_keep: Budget | None = None
    shallow_layer: Annotated[int, AtLeast(0)] | None = None
    window: Annotated[int, AtLeast(1)] | None = None
    local_shares: LocalShares | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        several = self.keep if isinstance(self.keep, Sequence) else (self.keep,)
        kinds = {type(budget) for budget in (*several, self.entering)}
        if len(kinds) > 1 or any(budget > self.entering for budget in several):
            raise ValueError(
                f"keep={self.keep!r} and input_keep={self.input_keep!r} should both be counts or "
                "both fractions, and input_keep no less than keep"
            )

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        return last_steps((16,), decoder_layers)

    @property
    def entering(self) -> int | float:
        """What stage 1 leaves: a count, or fraction of an image's patches."""
        if self.input_keep is not None:
            return self.input_keep
        first, last = (
            (self.keep[0], self.keep[-1])
            if isinstance(self.keep, Sequence)
            else (self.keep, self.keep)
        )
        most = max(first, 3 * last)
        return most if isinstance(most, int) else min(1.0, most)

    def enters(self, tokens: int) -> int:
        return resolve_keep(self.entering, tokens)

    def count(self, step: int, tokens: int) -> int:
        several = self.keep if isinstance(self.keep, Sequence) else (self.keep,)
        keep = tuple(of_entered(budget, self.entering) for budget in several)
        budgets = keep if len(keep) > 1 else keep[0]
        return tokens_after(budgets, step, len(self.steps), tokens)

    def scanned_layers(self, tower: TowerFacts) -> tuple[int, int]:
        """The encoder layers of the local and of the global scan.

        Raises:
            ValueError: ``shallow_layer`` is behind the layer that the model reads.
        """
        deep = read_layer(tower)
        if self.shallow_layer is not None:
            shallow = self.shallow_layer
        elif tower.whole_layers is not None:
            shallow = tower.whole_layers[0]
        else:
            shallow = (2 * _SHALLOW * tower.encoder_layers + _TOWER_DEPTH) // (2 * _TOWER_DEPTH)
            shallow = min(shallow, deep)
        known = tower.whole_layers is None or shallow in tower.whole_layers
        if shallow > deep or not known:
            allowed = f"between 0 and {deep}" if known else f"one of {tower.whole_layers}"
            raise ValueError(
                f"shallow_layer={shallow} should be {allowed}, the encoder layers that see whole "
                "images up to the one that the model reads"
            )
        return shallow, deep

    def plan(self, facts: ModelFacts) -> Plan:
        tower = facts.need_tower(self.name, whole=False)
        decoder = super().plan(facts).decoder
        if self.input_keep is not None:
            check_fits(self.input_keep, facts, name="input_keep")
        merges = facts.tower is None and tower.merges > 1
        window = self.window or (4 if merges else 6)
        shares = self.local_shares or ("limit" if merges else "spread")
        merging = MergingStage(self.name, self.entering, window, shares, self.new_positions)
        return Plan(
            encoder=(PatchAttention(*self.scanned_layers(tower)),),
            prompt=(merging,),
            decoder=decoder,
        )

    def score(self, attention: Attention, sequence: SequenceView) -> Tensor:
        return attention.rows(sequence.last_row())[:, :, 0].mean(1)
