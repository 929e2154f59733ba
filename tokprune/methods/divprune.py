"""DivPrune: keep the tokens of an image that lie farthest from each other (max–min diversity)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.engine.contracts import ImageTokens, Order
from tokprune.methods.base import Preset
from tokprune.methods.centring import Centre, centred
from tokprune.methods.registry import register_method
from tokprune.methods.scoring import PromptSelector
from tokprune.operators.diversity import divprune

_PAPER = "DivPrune, arXiv 2503.02175: ratio 0.098"
_CDPRUNER = "as compared in CDPruner, arXiv 2506.10967"
_TODRE = "as compared in ToDRE, arXiv 2505.18757v2, Table 1"


@register_method
@dataclass(frozen=True)
class DivPrune(PromptSelector):
    """The most isolated token first, then always the token farthest from those chosen.

    All tokens of an image compete, newline tokens included, as in the official code. An image
    with no more tokens than the budget is left untouched.

    Args:
        keep: visual tokens per image (count), or fraction of its n prompt tokens:
            int(round(fraction · n)), halves to even, at least 1.
        order: "spatial" keeps prompt order (public code); "published" is selection order, which
            the paper's numbers were made with.
        centre: "plain" or "standardised" compares tokens around their mean, and weighs distances by
            how unlike all others a token is ("Centering before Pruning", arXiv 2608.30263);
            "none" as DivPrune itself.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.

    Source: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning", CVPR 2025,
    arXiv 2503.02175.
    """

    name = "divprune"
    paper = "arXiv 2503.02175"
    presets = (
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

    newlines = True
    variants = ({"centre": "plain"},)

    order: Order = "spatial"
    centre: Centre = "none"

    @property
    def prompt_order(self) -> bool:
        return self.order == "spatial"

    def count(self, tokens: int) -> int:
        # a fraction rounds half to even, as in the official code
        keep = self.keep if isinstance(self.keep, int) else round(self.keep * tokens)
        return min(tokens, max(1, keep))

    def select(self, image: ImageTokens, keep: int) -> Tensor:
        return next(iter(self.select_alike([image], keep)))

    def select_alike(self, images: Sequence[ImageTokens], keep: int) -> Iterable[Tensor]:
        x, weight = centred(torch.stack([image.features for image in images]), self.centre)
        return divprune(x, keep, weight=weight)
