"""HoloV: budgets for runs of an image's tokens, and in each those the tower attends to most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from tokprune.engine.contracts import ImageTokens, Order, Plan
from tokprune.engine.model import ModelFacts
from tokprune.methods.base import Preset, check_fits
from tokprune.methods.options import AtLeast, Range
from tokprune.methods.registry import register_method
from tokprune.methods.scoring import PromptSelector, SelectorStage
from tokprune.methods.tower_attention import PatchAttention, read_layer
from tokprune.operators.holov import select_by_crops


@register_method
@dataclass(frozen=True)
class HoloV(PromptSelector):
    """The tokens of an image, its base tile and its stitched crops one after the other, are cut
    into consecutive runs. Each run gets the share of the budget that it has of the attention in the
    tower, and keeps the tokens that are attended to most. Text-agnostic; newline tokens go.

    The attention is the class token's at the layer the model reads, mean over heads; in towers
    without one, what a patch receives from all patches, and where the model makes one token of
    several patches, the mean of theirs.

    A run that is given more tokens than it has leaves them to the others, highest share first; the
    official code enters zero vectors for them
    (``tokprune.operators.select_by_crops(overflow="pad")``).

    Args:
        keep: visual tokens per image (count), all its tiles together, or fraction of its n patches.
        crops: number of runs; None: max(1, ⌊1024/576 · n/keep⌋), as the official code for
            Qwen2.5-VL has it, 16 of 576 tokens for 64 as in that for LLaVA.
        alpha: weight of the variance of a run's cosine similarities beside its attention, to whose
            size it is scaled: it changes next to nothing.
        order: "spatial" keeps prompt order; "published" is run by run, by falling attention in
            each.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.

    Source: "HoloV: Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic
    Context Retention", NeurIPS 2025, arXiv 2510.02912. Counts of runs for other budgets on LLaVA
    are not published.
    """

    name = "holov"
    needs = "features and class-token attention of one encoder layer"
    paper = "arXiv 2510.02912"
    without_class_token = "the mean attention that a patch receives stands in for the class token's"
    presets = (Preset("llava-1.5", 64, {"keep": 64}, "HoloV, official code: 64 tokens, 16 crops"),)

    crops: Annotated[int, AtLeast(1)] | None = None
    alpha: Annotated[float, Range(0, 1e6)] = 0.09
    order: Order = "spatial"

    @property
    def prompt_order(self) -> bool:
        return self.order == "spatial"

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        tower = facts.need_tower(self.name, whole=False)
        return Plan(encoder=(PatchAttention(read_layer(tower)),), prompt=(SelectorStage(self),))

    def runs(self, tokens: int, keep: int) -> int:
        """Number of runs that so many tokens are cut into."""
        return max(1, 1024 * tokens // (576 * keep)) if self.crops is None else self.crops

    def select(self, image: ImageTokens, keep: int) -> Tensor:
        return next(iter(self.select_alike([image], keep)))

    def select_alike(self, images: Sequence[ImageTokens], keep: int) -> Iterable[Tensor]:
        rows = torch.stack([image.patch_rows() for image in images])
        features = torch.stack([image.features[own] for image, own in zip(images, rows)])
        scores = [image.score for image in images if image.score is not None]
        attention = torch.stack([score[own] for score, own in zip(scores, rows, strict=True)])
        runs = self.runs(rows.shape[1], keep)
        return rows.gather(1, select_by_crops(features, attention, keep, runs, self.alpha))
