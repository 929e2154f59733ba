"""EVS: drop the tokens of a video that barely changed since the frame before."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokprune.engine.contracts import (
    ImageTokens,
    ModelFacts,
    Plan,
    Positions,
    PromptStage,
    Selection,
)
from tokprune.errors import UnsupportedModelError
from tokprune.methods.base import Method
from tokprune.methods.cells import check_whole, index_of_cells, keep_on_grid
from tokprune.methods.options import Budget
from tokprune.methods.registry import register_method
from tokprune.operators.temporal import evs, evs_count


@register_method
@dataclass(frozen=True)
class EVS(Method):
    """Keep a video's first frame whole, and of the others the tokens that differ most from the
    token at the same place one frame earlier, by cosine, after the projector. Text-agnostic.

    The baseline of serving engines (vLLM, SGLang): their threshold is a fixed count. Newline and
    class tokens stay and are not counted. A still image is a first frame: nothing is dropped.

    Args:
        keep: tokens of each video (count), or fraction, rounded down: 1 − the engines' pruning
            rate. Never less than one frame.
        positions: "preserve" keeps the original ids, "compact" renumbers the shortened prompt (as
            engines do for decoders with one-dimensional positions).

    With ``video_unit`` a number of frames, the first frame of every segment stays whole.

    Source: Bagrov et al., "Efficient Video Sampling: Pruning Temporally Redundant Tokens for
    Faster VLM Inference", 2025, arXiv 2510.14624.
    """

    name = "evs"
    stages = ("after projector",)
    needs = "features of a video"
    paper = "arXiv 2510.14624"
    source = "paper's equations"
    videos_only = True

    keep: Budget
    positions: Positions | None = None

    def plan(self, facts: ModelFacts) -> Plan:
        if not facts.videos:
            raise UnsupportedModelError(
                "evs drops what stays the same between the frames of a video, and "
                f"{facts.family} takes still images only, of which it would keep everything; "
                "use a method for images (tokprune methods lists them)"
            )
        if self.video_unit in ("frame", 1):
            raise ValueError(
                f"video_unit={self.video_unit!r} leaves evs no frame to compare with: the first of "
                "every part is kept whole; video_unit should be 'video' or a number of frames, at "
                "least 2"
            )
        return Plan(prompt=(_EVSStage(self),))


class _EVSStage(PromptStage):
    def __init__(self, method: EVS) -> None:
        self.keep, self.positions = method.keep, method.new_positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        if all(image.frames == 1 for image in images):
            warnings.warn(
                "evs found no video in this prompt: a still image is a first frame, which it "
                "keeps whole, so nothing is dropped",
                stacklevel=2,
            )
        answers: list[Selection | None] = [None] * len(images)
        alike: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            alike.setdefault((image.frames, image.grid[0] * image.grid[1]), []).append(i)
        for (frames, n), members in alike.items():  # videos of one size together
            k = evs_count(self.keep, frames, n)
            if k == frames * n:
                continue
            for i in members:
                check_whole(images[i], "evs")
            places = [index_of_cells(images[i]) for i in members]
            x = torch.stack([images[i].features[place] for i, place in zip(members, places)])
            kept = evs(x.unflatten(1, (frames, n)), k)
            for i, place, own in zip(members, places, kept):
                index = keep_on_grid(images[i], place[own], frames * n - k)
                answers[i] = Selection(index, in_order=True)
        return answers
