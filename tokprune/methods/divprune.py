"""DivPrune: keep the tokens of an image that lie farthest from each other (max–min diversity)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tokprune.engine.contracts import (
    ImageTokens,
    ModelFacts,
    Order,
    Plan,
    Positions,
    PromptStage,
    Selection,
)
from tokprune.methods.base import (
    Budget,
    Method,
    Preset,
    check_choice,
    check_fits,
    check_keep,
    register_method,
)
from tokprune.operators.diversity import divprune

_PAPER = "DivPrune, arXiv 2503.02175: ratio 0.098"
_CDPRUNER = "as compared in CDPruner, arXiv 2506.10967"
_TODRE = "as compared in ToDRE, arXiv 2505.18757v2, Table 1"


@register_method
@dataclass(frozen=True)
class DivPrune(Method):
    """The most isolated token first, then always the token farthest from those chosen.

    All tokens of an image compete, newline tokens included, as in the official code. An image
    with no more tokens than the budget is left untouched.

    Args:
        keep: visual tokens per image (count), or fraction of its n prompt tokens:
            int(round(fraction · n)), halves to even, at least 1.
        order: "spatial" keeps prompt order (public code); "published" is selection order, which
            the paper's numbers were made with.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.

    Source: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning", CVPR 2025,
    arXiv 2503.02175.
    """

    name: ClassVar[str] = "divprune"
    stages: ClassVar[tuple[str, ...]] = ("after projector",)
    needs: ClassVar[str] = "features"
    paper: ClassVar[str] = "arXiv 2503.02175"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset("llava-1.5", 0.098, {"keep": 0.098}, _PAPER),
        Preset("llava-1.5", 56, {"keep": 56}, _PAPER),
        Preset("llava-1.5", 128, {"keep": 128}, _CDPRUNER),
        Preset("llava-1.5", 64, {"keep": 64}, _CDPRUNER),
        Preset("llava-1.5", 32, {"keep": 32}, _CDPRUNER),
        Preset("llava-next", 0.098, {"keep": 0.098}, _PAPER),
        Preset("llava-next-video", 0.098, {"keep": 0.098}, _PAPER + "; all frames of a video"),
        Preset("llava-next", 720, {"keep": 720}, _TODRE),
        Preset("llava-next", 320, {"keep": 320}, _CDPRUNER),
        Preset("llava-next", 288, {"keep": 288}, _TODRE),
        Preset("llava-next", 160, {"keep": 160}, _CDPRUNER),
    )

    keep: Budget
    order: Order = "spatial"
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice(self.order, "order", ("spatial", "published"))
        check_choice(self.positions, "positions", ("compact", "preserve"))

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        return Plan(prompt=(_DivPruneStage(self),))


class _DivPruneStage(PromptStage):
    def __init__(self, method: DivPrune) -> None:
        self.method, self.positions = method, method.positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        answers: list[Selection | None] = [None] * len(images)
        alike: dict[int, list[int]] = {}
        for i, image in enumerate(images):
            if _budget(self.method.keep, image.count) < image.count:
                alike.setdefault(image.count, []).append(i)
        for n, members in alike.items():  # images of one size together
            x = torch.stack([images[i].features for i in members])
            order = divprune(x, _budget(self.method.keep, n))
            if self.method.order == "spatial":
                order = order.sort(-1).values
            for i, own in zip(members, order):
                answers[i] = Selection(own)
        return answers


def _budget(keep: Budget, n: int) -> int:
    """Tokens to keep of ``n``; a fraction rounds half to even, as the official code does."""
    k = keep if isinstance(keep, int) else round(keep * n)
    return min(n, max(1, k))
