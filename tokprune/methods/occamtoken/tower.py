"""Stage 1 of OccamToken: a register in the vision encoder, and the patches measured by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    ADDED,
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    Reduction,
    TowerInput,
    TowerTokens,
)
from tokprune.operators.occamtoken import AgainstRegister, against_register, shift, stage1

if TYPE_CHECKING:
    from tokprune.methods.occamtoken import OccamToken


class RegisterStage(EncoderStage):
    """``channels``: of the register neurons, by layer; ``layer``: the one that the model reads."""

    extra_tokens = 1

    def __init__(
        self, method: OccamToken, layer: int, channels: Mapping[int, Sequence[int]]
    ) -> None:
        self.method, self.channels = method, channels
        self.activation_layers = frozenset(channels)
        self.taps = self.after_layers = frozenset({layer})
        self.positions = method.new_positions

    def start(self, tower: TowerInput) -> EncoderRun:
        return _RegisterRun(self)


class _RegisterRun(EncoderRun):
    def __init__(self, stage: RegisterStage) -> None:
        self.stage = stage
        self.found: AgainstRegister | None = None

    def activation(self, layer: int, activations: Tensor, tokens: TowerTokens) -> Tensor:
        return shift(activations, self.stage.channels[layer], class_token=tokens.has_cls)

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        method = self.stage.method
        least = min(method.min_keep, tokens.group.shape[1])
        if tokens.has_cls:
            self.found = stage1(attention.cls_row(), method.lambda1, least)
        else:
            self.found = against_register(attention.received(), method.lambda1, least)

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction:
        """The class token, the patches that stay, the register; padding behind."""
        assert self.found is not None
        real = torch.ones(tokens.slots.shape, dtype=torch.bool, device=hidden.device)
        real[:, tokens.first_patch : -1] = self.found.keep
        counts = real.sum(1).tolist()
        most = max(counts)
        order = real.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :most]
        if min(counts) == most:
            return Reduction(order)
        return Reduction(torch.where(real.gather(1, order), order, -1), counts=counts)

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        # marked, so that the decoder knows it
        return EncoderOutcome(tag=tokens.slots[:, tokens.first_patch :] == ADDED)
