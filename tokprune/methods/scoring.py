"""Bases for methods that come down to one idea: a score, or a choice, for every visual token.

The whole of a method that keeps the tokens of the largest norm::

    @register_method
    @dataclass(frozen=True)
    class LargestNorm(PromptScorer):
        name = "largest-norm"

        def score(self, image: ImageTokens) -> Tensor:
            return image.features.norm(dim=-1)

Budgets, several images of a prompt, videos, ragged batches, positions and host work are the base's
business. Anything that does not fit is written against the stage interface itself
(:mod:`tokprune.engine.contracts`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    DecoderRun,
    DecoderStage,
    ImageTokens,
    KeepDecision,
    Plan,
    Positions,
    PromptStage,
    ScoringLayer,
    Selection,
    SequenceView,
)
from tokprune.engine.model import ImageLayout, ModelFacts
from tokprune.methods.anchors import Anchors
from tokprune.methods.base import Method, check_fits, check_layers_fit, resolve_keep
from tokprune.methods.options import Budget, BudgetSchedule, PruneBefore
from tokprune.methods.schedule import check_steps, mean_of_steps, steps_of, tokens_after
from tokprune.operators.topk import rank

# ------------------------------------------------------------------ language-model input


@dataclass(frozen=True)
class PromptSelector(Method):
    """Chooses ``keep`` tokens of every image at the language-model input, after the projector.

    Newline tokens are no candidates and go (``newlines``: they compete with the patches); survivors
    stay in prompt order (``prompt_order`` False: in the order of the choice). An image that has no
    more candidates than the budget is left untouched.

    Args:
        keep: visual tokens per image (count), or fraction of its candidates.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        anchors: the share of the budget that goes to tokens which others are merged into, or a
            mapping with the options of :class:`~tokprune.methods.anchors.Anchors`; None: none.
    """

    stages: ClassVar[tuple[str, ...]] = ("after projector",)
    newlines: ClassVar[bool] = False

    keep: Budget
    positions: Positions | None = None
    anchors: Anchors | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchors", Anchors.of(self.anchors))
        super().__post_init__()

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        return Plan(prompt=(SelectorStage(self),))

    def count(self, tokens: int) -> int:
        """Tokens to keep of an image with so many candidates."""
        return resolve_keep(self.keep, tokens)

    def mean_tokens(self, tokens: int, layers: int) -> float | None:
        return float(self.count(tokens))

    def fixed_count(self, facts: ModelFacts, layout: ImageLayout) -> int | None:
        candidates = layout.count if self.newlines else layout.patches
        left = self.count(candidates)
        return left if left < candidates else layout.count

    @property
    def prompt_order(self) -> bool:
        return True

    @abstractmethod
    def select(self, image: ImageTokens, keep: int) -> Tensor:
        """Rows [keep] of the image's tokens that stay (long)."""

    def select_alike(self, images: Sequence[ImageTokens], keep: int) -> Iterable[Tensor]:
        """The same for images with equally many candidates: to be overridden where a batch of them
        is cheaper than one after the other."""
        return [self.select(image, keep) for image in images]


@dataclass(frozen=True)
class PromptScorer(PromptSelector):
    """Keeps the tokens of the highest score at the language-model input; ties go to the earlier."""

    @abstractmethod
    def score(self, image: ImageTokens) -> Tensor:
        """A number [n] for every token of an image; higher stays."""

    def select(self, image: ImageTokens, keep: int) -> Tensor:
        score = self.score(image).to(image.features.device, non_blocking=True)
        if not self.newlines and image.patches < image.count:
            score = score.masked_fill(image.newline, -torch.inf)
        return rank(score)[:keep]


class SelectorStage(PromptStage):
    """Runs a selector on the images of a batch; those with equally many candidates together."""

    def __init__(self, method: PromptSelector) -> None:
        self.method, self.positions = method, method.new_positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        method = self.method
        answers: list[Selection | None] = [None] * len(images)
        alike: dict[int, list[int]] = {}
        for i, image in enumerate(images):
            tokens = image.count if method.newlines else image.patches
            if method.count(tokens) < tokens:
                alike.setdefault(tokens, []).append(i)
        anchors = method.anchors
        for tokens, members in alike.items():
            budget = keep = method.count(tokens)
            if anchors is not None:
                keep = anchors.chosen(budget)
            chosen: Iterable[Tensor] = [torch.empty(0, dtype=torch.long)] * len(members)
            if keep:
                chosen = method.select_alike([images[i] for i in members], keep)
            for i, index in zip(members, chosen, strict=True):
                index = index.to(images[i].features.device, non_blocking=True)
                if anchors is not None:
                    left = budget - index.shape[0]
                    answers[i] = anchors.merged(images[i], index, left, method.newlines)
                elif method.prompt_order:
                    answers[i] = Selection(index.sort().values, in_order=True)
                else:
                    answers[i] = Selection(index)
        return answers


# ------------------------------------------------------------------------------ decoder


@dataclass(frozen=True)
class DecoderScorer(Method):
    """Keeps the visual tokens of the highest score, once or in steps inside the decoder, in
    prefill. Every image has its own budget; ties go to the earlier token.

    Args:
        keep: visual tokens per image after each step, a count or fraction for each layer of
            ``prune_before``; fractions are of the tokens that entered the decoder. One number is
            the last step's: every step then keeps the same share of what it finds.
        prune_before: decoder layer or layers, 0-based, before which tokens are dropped.
        positions: "preserve" keeps the original ids, "compact" renumbers after every drop.
    """

    stages: ClassVar[tuple[str, ...]] = ("decoder prefill",)
    published_positions: ClassVar[Positions] = "preserve"
    #: whose attention :meth:`score` gets: of the layer before a cut, as it ran, or of the layer
    #: after it, computed on what enters it
    attention_of: ClassVar[Literal["previous layer", "next layer"]] = "previous layer"

    keep: BudgetSchedule
    prune_before: PruneBefore = 2
    positions: Positions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.keep, self.steps, "prune_before")

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        check_layers_fit(self.prune_before, facts, first=int(self.attention_of == "previous layer"))
        return Plan(decoder=(ScorerStage(self),))

    @property
    def steps(self) -> tuple[int, ...]:
        """The layers before which tokens are dropped."""
        return steps_of(self.prune_before)

    def count(self, step: int, tokens: int) -> int:
        """Tokens left after step ``step`` (0-based) of an image that entered with ``tokens``."""
        return tokens_after(self.keep, step, len(self.steps), tokens)

    def enters(self, tokens: int) -> int:
        """Tokens that enter the decoder of an image that would with ``tokens``."""
        return tokens

    def mean_tokens(self, tokens: int, layers: int) -> float | None:
        entering = self.enters(tokens)
        after = lambda step, now: self.count(step, entering)  # noqa: E731
        return mean_of_steps(entering, self.steps, layers, after)

    @property
    def ranked_together(self) -> bool:
        """Whether all images of a prompt share one ranking and their summed budget."""
        return False

    @abstractmethod
    def score(self, attention: Attention, sequence: SequenceView) -> Tensor:
        """A number [B, L] for every token of the sequence (those of text do not count); higher
        stays. Only the attention rows that are asked for are computed (``attention.rows``)."""


class ScorerStage(DecoderStage):
    """Runs a scorer before each of its layers."""

    def __init__(self, method: DecoderScorer) -> None:
        self.method, self.positions = method, method.new_positions
        self.prune_before = frozenset(method.steps)
        if method.attention_of == "previous layer":
            self.taps = frozenset(layer - 1 for layer in method.steps)

    @property
    def ahead(self) -> frozenset[int]:
        return self.prune_before if self.method.attention_of == "next layer" else frozenset()

    def start(self) -> DecoderRun:
        return ScorerRun(self.method)


class ScorerRun(DecoderRun):
    def __init__(self, method: DecoderScorer) -> None:
        self.method = method
        #: scores [B, L] of the newest step, before its drop
        self.score: Tensor | None = None

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        if self.counts(layer + 1, sequence) != sequence.counts:
            self.score = self.method.score(attention, sequence)

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        counts = self.counts(layer, sequence)
        if counts == sequence.counts:
            return None
        if self.method.attention_of == "next layer":
            self.score = self.method.score(scoring.attention(hidden, sequence), sequence)
        assert self.score is not None
        return KeepDecision.best(
            self.score, counts, sequence, self.method.new_positions, self.method.ranked_together
        )

    def counts(self, layer: int, sequence: SequenceView) -> list[list[int]]:
        """Tokens of every image that stay before a layer; host."""
        step = self.method.steps.index(layer)
        return sequence.counts_after(lambda tokens: self.method.count(step, tokens))
