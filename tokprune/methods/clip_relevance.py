"""Relevance of patches to a question, by the text tower paired with their encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    TowerInput,
    TowerTokens,
)
from tokprune.engine.model import ModelFacts
from tokprune.errors import UnsupportedModelError
from tokprune.operators.cdpruner import text_similarity


class TowerRelevance(ABC):
    """Relevance read off the vision tower, before the projector."""

    @abstractmethod
    def score(self, patches: Tensor, tower: TowerInput) -> Tensor:
        """Relevance of every patch, more is more: [tiles, T].

        Args:
            patches: [tiles, T, D] output of the tower's feature layer, class token left out.
            tower: which image each tile belongs to.
        """

    def stage(self, facts: ModelFacts) -> EncoderStage:
        """Observes the feature layer and hands the scores on to the prompt stages.

        Raises:
            UnsupportedModelError: the model's features come from several layers.
        """
        tower = facts.need_tower("relevance=ClipRelevance(…)")
        if tower.feature_layer is None:
            raise UnsupportedModelError(
                f"relevance={self!r} reads one encoder layer, and this model concatenates several "
                "(config.vision_feature_layer is a list)"
            )
        return _ScoreStage(self, tower.feature_layer)


@dataclass(frozen=True, eq=False)
class ClipRelevance(TowerRelevance):
    """Minus the cosine between CLIP's projections of a patch and of the question.

    The minus is meant: in CLIP's joint space patches of the background resemble a caption more
    than those of the object it names, which CDPruner's code turns round.

    A question longer than the text tower's window is cut every so many ids, and the cosines of
    the parts are averaged. Strip suffixes about the form of the answer ("Answer with a single
    word") yourself; the authors do so in some of their scripts.

    Args:
        clip: a transformers ``CLIPModel`` whose vision tower is the one inside the VLM (for
            LLaVA-1.5 and LLaVA-NeXT openai/clip-vit-large-patch14-336); its text tower, both
            projections and ``post_layernorm`` are used.
        questions: what is asked, for all images, or one per image in the order of
            ``pixel_values``; text, or ids of CLIP's tokenizer with start and end token.
        tokenizer: CLIP's tokenizer, where questions are text.

    Raises:
        ValueError: no question, or text without ``tokenizer``.

    Example::

        clip = CLIPModel.from_pretrained("openai/clip-vit-large-patch14-336")
        asked = ClipRelevance(clip, "Is there a dog?", tokenizer)
        with tokprune.compress(model, "cdpruner", keep=64, relevance=asked):
            ...

    Source: CDPruner, arXiv 2506.10967, and its code, Theia-4869/CDPruner (LLaVA-1.5).
    """

    clip: Any = field(repr=False)
    questions: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
    tokenizer: Any = field(default=None, repr=False)
    #: [M, P] float32 projected text, one for all images or one per image
    embeds: tuple[Tensor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given: Any = self.questions
        one = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
        several = [given] if one else list(given)
        if not several:
            raise ValueError("questions is empty; it should be a question, or one per image")
        embeds = tuple(self._embed(self._ids(question)) for question in several)
        object.__setattr__(self, "embeds", embeds)

    def _ids(self, question: Any) -> list[int]:
        if not isinstance(question, str):
            return [int(i) for i in question]
        if self.tokenizer is None:
            raise ValueError(
                f"questions={question!r} is text, which needs CLIP's tokenizer; pass tokenizer=, "
                "or the ids"
            )
        return list(self.tokenizer(question)["input_ids"])

    @torch.no_grad()
    def _embed(self, ids: list[int]) -> Tensor:
        """[M, P]: the question in parts of the text tower's window, the last one filled up."""
        window = self.clip.config.text_config.max_position_embeddings
        parts = [ids[i : i + window] for i in range(0, max(1, len(ids)), window)]
        filled = [part + [0] * (window - len(part)) for part in parts]
        mask = [[1] * len(part) + [0] * (window - len(part)) for part in parts]
        device = self.clip.text_projection.weight.device
        pooled = self.clip.text_model(
            input_ids=torch.tensor(filled, device=device),
            attention_mask=torch.tensor(mask, device=device),
        ).pooler_output
        embeds: Tensor = self.clip.text_projection(pooled)
        return embeds.float()

    @torch.no_grad()
    def project(self, patches: Tensor) -> Tensor:
        """[…, D] rows of the tower's feature layer in CLIP's joint space: […, P].

        Raises:
            ValueError: the tower is not as wide as CLIP's.
        """
        vision = getattr(self.clip.vision_model, "vision_model", self.clip.vision_model)
        weight = self.clip.visual_projection.weight
        if patches.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"clip has a vision tower of width {weight.shape[1]}, and the model's has width "
                f"{patches.shape[-1]}; clip should be the model that the tower was taken from"
            )
        rows = patches.to(weight.device, weight.dtype)
        projected: Tensor = self.clip.visual_projection(vision.post_layernorm(rows))
        return projected

    def score(self, patches: Tensor, tower: TowerInput) -> Tensor:
        projected = self.project(patches)
        texts = self._texts(tower, projected.device)
        scores = [-text_similarity(tile, text) for tile, text in zip(projected, texts)]
        return torch.stack(scores).to(patches.device)

    def product(self, patches: Tensor, tower: TowerInput) -> Tensor:
        """Plain product of the projections of every patch and of its question (mean over the parts
        of a long one), neither normalised: [tiles, T] float32.

        Args:
            patches: [tiles, T, D] output of the tower's feature layer, class token left out.
            tower: which image each tile belongs to.
        """
        projected = self.project(patches).float()
        texts = [text.mean(0) for text in self._texts(tower, projected.device)]
        return (projected @ torch.stack(texts)[:, :, None])[..., 0].to(patches.device)

    def _texts(self, tower: TowerInput, device: torch.device) -> list[Tensor]:
        """[M, P] projected question of every tile."""
        if len(self.embeds) == 1:
            return [self.embeds[0].to(device)] * len(tower.image_of_tile)
        images = tower.call_images or len(tower.tiles_per_image)
        if len(self.embeds) != images:
            raise ValueError(
                f"questions has {len(self.embeds)} entries for {images} images; it should "
                "have one for all, or one per image"
            )
        numbers = (tower.first_image + i for i in tower.image_of_tile)
        return [self.embeds[i].to(device) for i in numbers]


class _ScoreStage(EncoderStage):
    #: looks at the rows, and leaves them as they are
    reduces = False

    def __init__(self, relevance: TowerRelevance, layer: int) -> None:
        self.relevance = relevance
        self.after_layers = frozenset({layer})

    def start(self, tower: TowerInput) -> EncoderRun:
        return _ScoreRun(self.relevance, tower)


class _ScoreRun(EncoderRun):
    def __init__(self, relevance: TowerRelevance, tower: TowerInput) -> None:
        self.relevance, self.tower = relevance, tower
        self.score: Tensor | None = None
        self.seen: TowerTokens | None = None

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> None:
        self.score = self.relevance.score(hidden[:, tokens.first_patch :], self.tower)
        self.seen = tokens

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        if self.score is None or self.seen is None:
            return EncoderOutcome()
        return EncoderOutcome(score=tokens.carry(self.score, self.seen))
