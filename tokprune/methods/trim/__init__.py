"""TRIM: the patches that CLIP relates to the question, and one token for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tokprune.engine.contracts import Plan, Positions
from tokprune.engine.model import ModelFacts
from tokprune.methods.base import Method, Preset, check_fits, resolve_keep
from tokprune.methods.clip_relevance import ClipRelevance
from tokprune.methods.options import Budget
from tokprune.methods.registry import register_method
from tokprune.methods.tiles import Scope, feature_layer
from tokprune.methods.trim.input import InputStage
from tokprune.methods.trim.tower import TowerStage


@register_method
@dataclass(frozen=True)
class TRIM(Method):
    """Of every tile (and frame), keep the patches that are least similar to the question in CLIP's
    joint space, and append the mean of all others as one more token.

    Least similar is meant: the patches of CLIP's last layer but one often respond inversely to a
    text. The similarity is the plain product of both projections, of the patches as the model reads
    them behind CLIP's last norm; kept patches and mean go through the projector.

    This needs a :class:`ClipRelevance`, and a model with its vision tower. The default
    ``relevance="text"`` is a substitute of ours for every model, at the language-model input: the
    mean cosine between a token after the projector and the embeddings of the prompt's text behind
    its image (of all its text where none follows), of which the most similar stay.

    Kept patches enter in prompt order, then the means, one a tile. Padding is neither kept nor part
    of a mean, and newline tokens go. A tile that has no more patches than ``keep`` keeps them all,
    without a mean. After a method that reduces the encoder, all survivors of an image are one tile.
    As with every method that reads the question, later questions about an image see what the first
    one left.

    Args:
        keep: tokens of each tile, the mean included (count), or fraction of its patches; with a
            count of 1 the best patch stays, and no mean. None (as published): one patch for every
            outlier among the probabilities of a tile's patches (above the upper fence of the box
            plot of their softmax), at least one, and the mean.
        relevance: a :class:`ClipRelevance`, or "text", the substitute. A question that is longer
            than CLIP's window is read in parts; the official code cuts it there, which ids that
            are cut do as well.
        sign: of the similarity in the ranking, 1 (the most similar stay) or −1; None: −1 with
            CLIP, as published, and 1 for the substitute.
        aggregate: append the mean.
        outliers: counted in each "tile", or as the official code does, in all tiles of the "call",
            of which then every one keeps the same share, and a batch changes a sample's number.
        scope: what ``keep`` counts on tiled models: "tile", or "image", whose tiles then share it
            equally.
        positions: "compact" renumbers the shortened prompt; "preserve" keeps the original ids, that
            of the mean being the one of its last patch.

    Source: Song et al., "Less is More: A Simple yet Effective Token Reduction Method for Efficient
    Multi-modal LLMs", COLING 2025, arXiv 2409.10994. Tiles are ours.
    """

    name = "trim"
    stages = ("encoder, feature layer", "after projector")
    needs = "features and CLIP's text tower, or text embeddings"
    paper = "arXiv 2409.10994"
    reads_prompt = True
    adaptive = "without keep"
    presets = (Preset("llava-1.5", "auto", {"keep": None}, "TRIM's code: ratio −1"),)

    keep: Budget | None = None
    relevance: Literal["text"] | ClipRelevance = "text"
    sign: Literal[-1, 1] | None = None
    aggregate: bool = True
    outliers: Literal["tile", "call"] = "tile"
    scope: Scope = "tile"
    positions: Positions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known: Any = self.relevance
        if not isinstance(known, ClipRelevance) and known != "text":
            raise ValueError(f"relevance={known!r} should be 'text' or a ClipRelevance")

    @property
    def direction(self) -> int:
        """1 where the most similar stay, −1 where the least similar do."""
        return self.sign or (1 if self.relevance == "text" else -1)

    def budget(self, patches: int, tiles: int) -> tuple[int, bool]:
        """Patches that stay as they are of a tile with so many, of an image with so many tiles, and
        whether the mean follows; for a fixed ``keep``."""
        assert self.keep is not None
        if self.scope == "image" and isinstance(self.keep, int):
            total = min(patches, max(1, self.keep // max(1, tiles)))
        else:
            total = resolve_keep(self.keep, patches)
        mean = self.aggregate and 1 < total < patches
        return total - mean, mean

    def plan(self, facts: ModelFacts) -> Plan:
        tower = facts.tower
        if self.keep is not None:
            inside = tower is not None and self.scope == "tile"
            check_fits(self.keep, facts, tower.patches if inside and tower is not None else None)
        if not isinstance(self.relevance, ClipRelevance):
            return Plan(prompt=(InputStage(self),))
        tower = facts.need_tower(f"relevance={self.relevance!r}")
        pooled = facts.frame_grid is not None
        stage = TowerStage(self, self.relevance, feature_layer(tower, self.name), pooled)
        return Plan(
            encoder=(stage,), prompt=(InputStage(self, videos_only=True),) if pooled else ()
        )
