"""What a method hands to the engine: stages, and what the engine hands to them.

A method describes itself by a :class:`Plan` of up to three kinds of stages. Stages are static
(built once per patch); each forward starts a fresh *run* from every stage, so no state of one
forward can reach another. Runs see tensors and book-keeping only, never transformers modules.

Stage places, in the order a visual token meets them::

    encoder block, between attention and MLP   EncoderRun.between
    encoder block, inside the MLP              EncoderRun.activation
    encoder block, at its end                  EncoderRun.after
    language-model input (after projector)    PromptStage.select
    before decoder layer l, prefill            DecoderRun.before_layer
    KV cache, end of prefill                   DecoderRun.after_prefill
"""

from __future__ import annotations

from dataclasses import dataclass

from tokprune.engine.contracts.attention import Attention, visible_rows
from tokprune.engine.contracts.decoder import (
    CachePolicy,
    DecoderRun,
    DecoderStage,
    KeepDecision,
    ScoringLayer,
    SequenceView,
)
from tokprune.engine.contracts.prompt import ImageTokens, PromptStage, Selection
from tokprune.engine.contracts.rectify import Rectify
from tokprune.engine.contracts.vision import (
    ADDED,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    Order,
    Positions,
    Reduction,
    TowerInput,
    TowerTokens,
)
from tokprune.engine.model import ModelFacts, TowerFacts, VideoUnit

__all__ = [
    "ADDED",
    "Attention",
    "CachePolicy",
    "DecoderRun",
    "DecoderStage",
    "EncoderOutcome",
    "EncoderRun",
    "EncoderStage",
    "ImageTokens",
    "KeepDecision",
    "ModelFacts",
    "Order",
    "Plan",
    "Positions",
    "PromptStage",
    "Rectify",
    "Reduction",
    "ScoringLayer",
    "Selection",
    "SequenceView",
    "TowerFacts",
    "TowerInput",
    "TowerTokens",
    "visible_rows",
]


@dataclass(frozen=True)
class Plan:
    """The stages of one method (or of a composition) on one model. ``video_unit``: what of a
    video the prompt and decoder stages see as one image
    (:attr:`tokprune.methods.base.Method.video_unit`). ``rectify``: what the decoder's attention
    makes up for."""

    encoder: tuple[EncoderStage, ...] = ()
    prompt: tuple[PromptStage, ...] = ()
    decoder: tuple[DecoderStage, ...] = ()
    video_unit: VideoUnit = "video"
    rectify: Rectify | None = None
