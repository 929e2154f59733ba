"""A video model without pooling, for tests: LLaVA-1.5 whose "images" are videos of frames.

Each sample's prompt holds the tokens of all its frames as one run; ``pixel_values`` is [B · T, 3,
H, W]. At the language-model input the tiles of such an image are its frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from tiny import IMAGE_SIZE, IMAGE_TOKEN, PATCHES
from torch import Tensor, nn

from tokprune.engine.model import ImageLayout, ModelFacts, Parts
from tokprune.families import registry
from tokprune.families.llava import Llava


class ToyVideo(Llava):
    """Every ``frames`` consecutive pictures of a batch are one video."""

    name = "toy-video"

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def facts(self, model: nn.Module, parts: Parts) -> ModelFacts:
        facts = super().facts(model, parts)
        return replace(facts, videos=True, max_visual_tokens=self.frames * facts.max_visual_tokens)

    def images(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        assert facts.tower is not None
        packed = torch.arange(self.frames * facts.tower.tokens_per_tile)
        videos = call[self.pixels].shape[0] // self.frames
        return [
            ImageLayout(packed, self.frames, frames=self.frames, video=self.frames > 1)
        ] * videos


@contextmanager
def video_family(frames: int) -> Iterator[None]:
    """LLaVA-1.5 models are video models inside."""
    before = registry._FAMILIES["LlavaForConditionalGeneration"]
    registry.register_family(ToyVideo(frames))
    try:
        yield
    finally:
        registry.register_family(before)


def video_inputs(prompts: list[tuple[int, int]], frames: int, seed: int = 1) -> dict[str, Tensor]:
    """Left-padded batch: per prompt (text before, text after) its video. Each frame is the one
    before with some of its patches drawn anew, so that parts of the picture stand still."""
    generator = torch.Generator().manual_seed(seed)
    tokens = frames * PATCHES
    longest = max(a + b for a, b in prompts) + tokens
    ids, mask = torch.zeros(len(prompts), longest, dtype=torch.long), []
    for row, (before, after) in enumerate(prompts):
        text = torch.randint(3, 98, (before + after,), generator=generator)
        own = torch.cat([text[:before], torch.full((tokens,), IMAGE_TOKEN), text[before:]])
        ids[row, longest - len(own) :] = own
        mask.append([0] * (longest - len(own)) + [1] * len(own))
    pixels = []
    for _ in prompts:
        frame = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        for number in range(frames):
            if number:
                again = torch.rand(6, 6, generator=generator) < 0.4
                where = again.repeat_interleave(4, 0).repeat_interleave(4, 1)
                new = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
                frame = torch.where(where, new, frame)
            pixels.append(frame)
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor(mask),
        "pixel_values": torch.stack(pixels),
    }
