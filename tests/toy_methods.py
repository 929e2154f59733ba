"""Small methods with known answers and no scoring, for the trace, its costs and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    CachePolicy,
    DecoderRun,
    DecoderStage,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    KeepDecision,
    ModelFacts,
    Plan,
    PromptStage,
    Reduction,
    ScoringLayer,
    Selection,
    SequenceView,
    TowerInput,
    TowerTokens,
)
from tokprune.methods import Method


@dataclass(frozen=True)
class MergeAtInput(Method):
    """Prompt stage: every ``step`` neighbouring patches become one token, newlines go."""

    name: ClassVar[str] = "test-merge-at-input"
    step: int = 3

    def plan(self, facts: ModelFacts) -> Plan:
        return Plan(prompt=(_Input(self.step),))


class _Input(PromptStage):
    def __init__(self, step: int) -> None:
        self.step = step

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        answers: list[Selection | None] = []
        for image in images:
            rank = torch.where(image.newline, -1, (~image.newline).long().cumsum(0) - 1)
            group = torch.where(rank < 0, -1, rank // self.step)
            index = ((rank >= 0) & (rank % self.step == 0)).nonzero().view(-1)
            answers.append(Selection(index, image.features[index], group))
        return answers


@dataclass(frozen=True)
class MergeInTower(Method):
    """Encoder stage: in layer ``layer`` each odd patch joins the patch at its left; optionally
    the last ``drop`` patches of every tile go after layer ``layer + 1``."""

    name: ClassVar[str] = "test-merge-in-tower"
    layer: int = 2
    between: bool = True
    drop: int = 0

    def plan(self, facts: ModelFacts) -> Plan:
        return Plan(encoder=(_TowerStage(self),))


class _TowerStage(EncoderStage):
    def __init__(self, method: MergeInTower) -> None:
        self.method = method
        at = frozenset({method.layer})
        later = frozenset({method.layer + 1}) if method.drop else frozenset()
        self.between_layers = at if method.between else frozenset()
        self.after_layers = later | (frozenset() if method.between else at)

    def start(self, tower: TowerInput) -> EncoderRun:
        return _TowerRun(self.method)


class _TowerRun(EncoderRun):
    def __init__(self, method: MergeInTower) -> None:
        self.method = method

    def _merge(self, hidden: Tensor, tokens: TowerTokens) -> Reduction:
        first, rows = tokens.first_patch, tokens.rows
        keep = torch.arange(first, rows, 2)
        keep = torch.cat([torch.arange(first), keep]).expand(hidden.shape[0], -1)
        place = torch.arange(rows)
        group = torch.where(place < first, place, (place - first) // 2 + first)
        return Reduction(keep, group=group.expand(hidden.shape[0], -1))

    def between(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        return self._merge(hidden, tokens)

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        if layer == self.method.layer:
            return self._merge(hidden, tokens)
        rows = torch.arange(tokens.rows - self.method.drop)
        return Reduction(rows.expand(hidden.shape[0], -1))


@dataclass(frozen=True)
class DropInDecoder(Method):
    """Decoder stage: before layer ``layer`` each image keeps its first ``keep`` tokens; with
    ``cache`` the last layer caches text alone."""

    name: ClassVar[str] = "test-drop-in-decoder"
    keep: int = 5
    layer: int = 3
    cache: bool = False

    def plan(self, facts: ModelFacts) -> Plan:
        return Plan(decoder=(_DecoderStage(self),))


class _DecoderStage(DecoderStage):
    def __init__(self, method: DropInDecoder) -> None:
        self.method = method
        self.prune_before = frozenset({method.layer})
        self.has_cache_policy = method.cache

    def start(self) -> DecoderRun:
        return _DecoderRun(self.method)


class _DecoderRun(DecoderRun):
    def __init__(self, method: DropInDecoder) -> None:
        self.method = method

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        mask = torch.zeros_like(sequence.visual)
        for s in range(sequence.segments):
            mine = sequence.segment == s
            mask |= mine & (mine.long().cumsum(1) <= self.method.keep)
        counts = [[min(n, self.method.keep) for n in row] for row in sequence.counts]
        return KeepDecision(mask, counts)

    def after_prefill(self, sequences: Sequence[SequenceView]) -> CachePolicy | None:
        sequence = sequences[-1]
        text = sequence.valid & ~sequence.visual
        lengths = text.sum(1).tolist()
        place = torch.where(text, torch.arange(text.shape[1]), -1)
        index = place.sort(1).values[:, -max(lengths) :]
        last = len(sequences) - 1
        return CachePolicy({last: index}, {last: lengths})
