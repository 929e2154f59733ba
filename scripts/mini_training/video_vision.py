"""Phase 1 of the video model: tower and projector learn to say what every block of a frame shows.

They start from mini, which has seen objects on the grid of patches only. The projected block is
fitted to the symbols that the language model learns on, and heads, thrown away afterwards, name the
fields and the place inside the block. Until near the end part of the ground is left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_training.labels import FIELDS
from mini_training.loop import Phase
from mini_training.optimizer import Optimizer
from mini_training.video_labels import (
    BLOCK,
    NAMED,
    POOL,
    TOKENS,
    FrameLabels,
    block_texture,
    frame_labels,
    patches_of,
)
from mini_training.video_symbols import VideoSymbols
from mini_training.vision import run_vision, tower_features
from tokprune.eval.benchmarks.mini.scene import random_state
from tokprune.eval.benchmarks.mini_video.clip import TASKS
from tokprune.eval.benchmarks.mini_video.make import make_clip
from tokprune.eval.benchmarks.mini_video.render import render

#: frames that are rendered of a clip
FRAMES = 2


class BlockHeads(nn.Module):
    """Auxiliary readings of pooled features, used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fields = nn.ModuleDict({name: nn.Linear(width, FIELDS[name]) for name in NAMED})
        self.offset = nn.Linear(width, 2)


def normalised(raw: np.ndarray) -> Tensor:
    """[n, SIDE, SIDE, 3] uint8 → [n, 3, SIDE, SIDE] as mini's processor makes them."""
    return torch.from_numpy(raw).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.25)


def choose_blocks(label: np.ndarray, number: int, rng: np.random.RandomState) -> np.ndarray:
    """Every block of an object, and random ground up to ``number``; in raster order."""
    rank = rng.rand(TOKENS) - (label[:, 0] > 0)
    return np.sort(np.argsort(rank)[:number])


def pooled_features(model: Any, pixels: Tensor, blocks: np.ndarray | None) -> Tensor:
    """[n, blocks, width] of the tower, averaged per block as LLaVA-NeXT-Video does.

    ``blocks`` [n, k]: the only ones to run; None: all.
    """
    if blocks is None:
        blocks = np.tile(np.arange(TOKENS), (len(pixels), 1))
        patch = None
        order = torch.from_numpy(patches_of(np.arange(TOKENS))).to(pixels.device)
    else:
        patch = torch.from_numpy(np.stack([patches_of(own) for own in blocks])).to(pixels.device)
        order = None
    hidden = tower_features(model, pixels, patch)[0][:, 1:]
    if order is not None:
        hidden = hidden[:, order]
    return hidden.unflatten(1, (-1, POOL * POOL)).mean(2)


def gathered(labels: list[FrameLabels], raw: np.ndarray, blocks: np.ndarray) -> tuple[Tensor, ...]:
    """Labels, places and textures of the chosen blocks as tensors."""
    rows = np.arange(len(labels))[:, None]
    label = np.stack([own.label for own in labels])[rows, blocks]
    place = np.stack([own.place for own in labels])[rows, blocks]
    texture = np.stack([block_texture(picture) for picture in raw])[rows, blocks]
    return torch.from_numpy(label), torch.from_numpy(place).float(), torch.from_numpy(texture)


def vision_losses(
    projector: Any, heads: BlockHeads, symbols: VideoSymbols, pooled: Tensor, label: Tensor,
    place: Tensor, texture: Tensor,
) -> tuple[Tensor, Tensor, dict[str, float]]:  # fmt: skip
    """Projected blocks; the loss of symbols, fields and offsets; and how well each goes."""
    middle = label[..., 3] == 1
    weight = torch.where(middle, 1.0, 0.2)
    weight = weight / weight.sum()
    want = symbols(label, place, texture.to(pooled.dtype)).float()
    projected = projector(pooled)
    fit = ((projected.float() - want).square().mean(-1) * weight).sum() / want.var()
    total = fit
    told = {"fit": float(fit.detach())}
    normed = heads.norm(pooled)
    right = torch.ones_like(middle)
    for i, name in enumerate(NAMED):
        logits = heads.fields[name](normed).float()
        error = F.cross_entropy(logits.transpose(1, 2), label[..., i], reduction="none")
        total = total + (error * weight).sum()
        good = logits.argmax(-1) == label[..., i]
        right &= good
        told[name] = float(good[middle].float().mean())
    aim = (place % BLOCK) / BLOCK - 0.5
    off = (heads.offset(normed).float() - aim).square().sum(-1)
    thing = middle & (label[..., 4] == 0)
    off = (off * thing).sum() / thing.sum().clamp(min=1)
    told["pixels off"] = float(off.detach().div(2).sqrt() * BLOCK)
    told["all"] = float(right[middle].float().mean())
    told["ground"] = float((right & ~middle).sum() / (~middle).sum())
    return projected, total + 4 * off, told


def frames_of(seed: int, numbers: range) -> tuple[list[FrameLabels], np.ndarray]:
    """Labels and raw pixels of the first frames of clips, all types in turn."""
    labels, raw = [], []
    for number in numbers:
        clip = replace(make_clip(seed, number, TASKS[number % len(TASKS)]), frames=FRAMES)
        labels += [frame_labels(clip, frame) for frame in range(FRAMES)]
        raw += [np.asarray(picture) for picture in render(clip)]
    return labels, np.stack(raw)


def train_video_vision(
    model: Any, symbols: VideoSymbols, folder: Path, total: int, lr: float, device: Any,
    size: int = 10, part: int = 68, full_from: float = 0.92,
) -> None:  # fmt: skip
    """Train tower and projector on two frames of each of ``total`` clips."""
    model.to(device, torch.bfloat16).train()
    symbols.to(device, torch.bfloat16)
    heads = BlockHeads(model.config.vision_config.hidden_size).to(device, torch.bfloat16)
    base = model.model
    tower = getattr(base.vision_tower, "vision_model", base.vision_tower)
    for module in (tower.encoder.layers[-1], tower.post_layernorm):  # behind the feature layer
        module.requires_grad_(False)
    named = [(f"tower.{n}", p) for n, p in base.vision_tower.named_parameters()]
    named += [(f"projector.{n}", p) for n, p in base.multi_modal_projector.named_parameters()]
    named += [(f"heads.{n}", p) for n, p in heads.named_parameters()]
    phase = Phase(folder, Optimizer(named, lr), total)

    def forward(seed: int, first: int, number: int | None) -> tuple[Tensor, dict[str, float]]:
        labels, raw = frames_of(seed, range(first, first + size))
        rng = random_state((seed, first), "blocks")
        chosen = None
        if number is not None:
            chosen = np.stack([choose_blocks(own.label, number, rng) for own in labels])
        pixels = normalised(raw).to(device, torch.bfloat16)
        pooled = pooled_features(model, pixels, chosen)
        every = np.tile(np.arange(TOKENS), (len(labels), 1)) if chosen is None else chosen
        target = (part.to(device) for part in gathered(labels, raw, every))
        _, loss, told = vision_losses(base.multi_modal_projector, heads, symbols, pooled, *target)
        return loss, told

    run_vision(phase, forward, size, part, full_from, checked=2)
