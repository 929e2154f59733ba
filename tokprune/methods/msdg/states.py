"""MSDG-Prune's stages: what an encoder's layers make of every patch, and the question beside it."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    TowerInput,
    TowerTokens,
)
from tokprune.methods.msdg.layers import Layers, Sink
from tokprune.methods.scoring import SelectorStage
from tokprune.operators.msdg import change_direction


class StatesStage(EncoderStage):
    """Reads rows and leaves them as they are. What it finds of a patch [D + 2]: the direction of
    its change, the length of that in the middle layers, and 1 where it is a sink."""

    reduces = False

    def __init__(self, layers: Layers, sink: Sink | None, packs: bool) -> None:
        self.layers, self.sink, self.packs = layers, sink, packs
        read = {layer - 1 for layer in layers}
        self.after_layers = frozenset(read if sink is None else read | {sink[0]})

    @property
    def share_key(self) -> Hashable:
        return "msdg", self.layers, self.sink

    def start(self, tower: TowerInput) -> EncoderRun:
        return _StatesRun(self)


class _StatesRun(EncoderRun):
    def __init__(self, stage: StatesStage) -> None:
        self.stage = stage
        #: states of the patches by the layer that they enter, and who is a sink
        self.states: dict[int, Tensor] = {}
        self.marked: Tensor | None = None

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> None:
        states, sink = hidden[:, tokens.first_patch :], self.stage.sink
        if layer + 1 in self.stage.layers:
            self.states[layer + 1] = states
        if sink is not None and layer == sink[0]:
            if sink[1] >= states.shape[2]:
                raise ValueError(
                    f"sink={sink!r} names coordinate {sink[1]} of states that have "
                    f"{states.shape[2]}, counted from 0"
                )
            self.marked = (states[..., sink[1]].float().abs() > sink[2]).float()

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        known = [self.states[layer] for layer in self.stage.layers]
        rows = {len(own[0]) for own in (*known, *([] if self.marked is None else [self.marked]))}
        if rows != {tokens.rows - tokens.first_patch}:
            return EncoderOutcome()  # another method drops rows
        early, late, start, end = (own.to(known[1].device) for own in known)
        change = torch.linalg.vector_norm(end.float() - start.float(), dim=-1)
        marked = torch.zeros_like(change) if self.marked is None else self.marked.to(change.device)
        found = [change_direction(early, late), change[..., None], marked[..., None]]
        return EncoderOutcome(metric=torch.cat(found, dim=-1))


class QuestionStage(SelectorStage):
    wants_text = True
