"""Random: keep a random subset of every image's patches. The yardstick of the field."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokprune.engine.contracts import ImageTokens
from tokprune.methods.options import Seed
from tokprune.methods.registry import register_method
from tokprune.methods.scoring import PromptScorer


@register_method
@dataclass(frozen=True)
class Random(PromptScorer):
    """A uniformly random subset of the patches of each image, in prompt order.

    Newline tokens go. The draw depends on ``seed``, the image's token count and nothing else, so
    that a batch equals single runs and a run can be repeated.

    Args:
        keep: visual tokens per image (count) or fraction of the image's patches.
        seed: of the draw.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
    """

    name = "random"
    needs = "nothing"
    source = "ours"
    control = True

    seed: Seed = 0

    def score(self, image: ImageTokens) -> torch.Tensor:
        # drawn on the host, so that every device draws the same
        generator = torch.Generator().manual_seed(self.seed)
        return -torch.randperm(image.count, generator=generator).float()
