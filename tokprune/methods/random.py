"""Random: keep a random subset of every image's patches. The yardstick of the field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tokprune.engine.contracts import (
    ImageTokens,
    ModelFacts,
    Plan,
    Positions,
    PromptStage,
    Selection,
)
from tokprune.methods.base import (
    Budget,
    Method,
    check_choice,
    check_fits,
    check_keep,
    register_method,
    resolve_keep,
)


@register_method
@dataclass(frozen=True)
class Random(Method):
    """A uniformly random subset of the patches of each image, in prompt order.

    Newline tokens go. The draw depends on ``seed``, the image's token count and nothing else, so
    that a batch equals single runs and a run can be repeated.

    Args:
        keep: visual tokens per image (count) or fraction of the image's patches.
        seed: of the draw.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
    """

    name: ClassVar[str] = "random"
    stages: ClassVar[tuple[str, ...]] = ("after projector",)
    needs: ClassVar[str] = "nothing"

    keep: Budget
    seed: int = 0
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice(self.positions, "positions", ("compact", "preserve"))

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        return Plan(prompt=(_RandomStage(self.keep, self.seed, self.positions),))


class _RandomStage(PromptStage):
    def __init__(self, keep: Budget, seed: int, positions: Positions) -> None:
        self.keep, self.seed, self.positions = keep, seed, positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return [self._one(image) for image in images]

    def _one(self, image: ImageTokens) -> Selection | None:
        k = resolve_keep(self.keep, image.patches)
        if k >= image.patches:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        # ranks are drawn on the host, so every device draws the same
        rank = torch.randperm(image.count, generator=generator).to(image.features.device)
        rank = torch.where(image.newline, image.count, rank)
        return Selection(rank.argsort(stable=True)[:k].sort().values)
