"""Phase 3 of the video model: questions about real frames, and symbols beside them.

The tower stays as phase 1 left it; projector and language model learn on what it really writes.
The first part leaves ground out (at true positions, to save time), the last part sees every block.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from evals.mini.scene import random_state
from evals.mini_video.clip import TASKS, Clip
from evals.mini_video.make import make_clip
from evals.mini_video.render import render
from mini_training.loop import Phase, per_task
from mini_training.optimizer import Optimizer
from mini_training.video_hints import token_hints
from mini_training.video_labels import TOKENS, frame_labels
from mini_training.video_language import Hints, symbolic_clips, video_answer_loss
from mini_training.video_scenes import training_clip
from mini_training.video_symbols import VideoSymbols
from mini_training.video_turns import draw_video_squeeze, draw_video_turns, pack_video, turn
from mini_training.video_vision import (
    choose_blocks,
    gathered,
    normalised,
    pooled_features,
)

#: other clips than in the phases before; the benchmark's splits use further seeds
TRAIN_SEED, CHECK_SEED = 3, 2
#: weight of the loss that holds the projector to the symbols
FIT = 0.3


def named_parameters(model: Any, hints: Hints) -> list[tuple[str, torch.nn.Parameter]]:
    """All parts, under the names of the phases before."""
    base = model.model
    return [
        *((f"tower.{n}", p) for n, p in base.vision_tower.named_parameters()),
        *((f"projector.{n}", p) for n, p in base.multi_modal_projector.named_parameters()),
        *((f"language.{n}", p) for n, p in base.language_model.named_parameters()),
        *((f"hints.{n}", p) for n, p in hints.named_parameters()),
    ]


def restore(model: Any, hints: Hints, *folders: Path) -> None:
    """Weights of finished phases, from their float32 masters."""
    state: dict[str, Tensor] = {}
    for folder in folders:
        if (path := folder / "state.safetensors").exists():
            state |= load_file(path)
    with torch.no_grad():
        for name, p in named_parameters(model, hints):
            if (saved := state.get(f"master.{name}")) is not None:
                p.copy_(saved)


def seen_clips(
    model: Any, clips: list[Clip], part: int | None, device: Any
) -> tuple[Tensor, tuple[Tensor, ...], np.ndarray, list[np.ndarray]]:
    """The tower on rendered clips: pooled features [B, V, width]; labels, places and textures of
    the blocks; their numbers [B, V]; their hints [V, …] per clip.

    Args:
        part: blocks of a frame to run; None: all.
    """
    pooled, told, numbers, hints = [], [], [], []
    for clip in clips:
        rng = random_state(clip.key, "blocks")
        labels = [frame_labels(clip, frame) for frame in range(clip.frames)]
        raw = np.stack([np.asarray(picture) for picture in render(clip)])
        every = np.tile(np.arange(TOKENS), (clip.frames, 1))
        chosen = None
        if part is not None:
            every = chosen = np.stack([choose_blocks(own.label, part, rng) for own in labels])
        with torch.no_grad():
            pixels = normalised(raw).to(device, torch.bfloat16)
            pooled.append(pooled_features(model, pixels, chosen).flatten(0, 1))
        told.append([own.flatten(0, 1) for own in gathered(labels, raw, every)])
        numbers.append((np.arange(clip.frames)[:, None] * TOKENS + every).ravel())
        hints.append(
            np.concatenate([token_hints(clip, f, labels[f])[every[f]] for f in range(clip.frames)])
        )
    return (
        torch.stack(pooled),
        tuple(torch.stack(own).to(device) for own in zip(*told)),
        np.stack(numbers),
        hints,
    )


def fit_loss(symbols: VideoSymbols, projected: Tensor, told: tuple[Tensor, ...]) -> Tensor:
    """Distance to the symbols, of blocks that stand for something above all."""
    label, place, texture = told
    want = symbols(label, place, texture.to(projected.dtype)).float()
    weight = torch.where(label[..., 3] == 1, 1.0, 0.2)
    error = (projected.float() - want).square().mean(-1)
    return (error * weight).sum() / weight.sum() / want.var()


def train_video_joint(
    model: Any, symbols: VideoSymbols, out: Path, total: int, lr: float, device: Any,
    size: int = 4, part: int = 64, full_from: float = 0.85,
) -> None:  # fmt: skip
    """Train projector and language model on ``total`` clips; all blocks from ``full_from`` on."""
    hints = Hints(model.config.text_config.hidden_size)
    restore(model, hints, out / "vision", out / "language")
    model.to(device, torch.bfloat16).train()
    hints.to(device, torch.bfloat16)
    symbols.to(device, torch.bfloat16)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.model.vision_tower.requires_grad_(False)
    projector = model.model.multi_modal_projector
    optimizer = Optimizer(named_parameters(model, hints), lr)
    phase = Phase(out / "joint", optimizer, total, cooldown=0.6)
    kept: list[tuple[list[Clip], Tensor]] = []  # features of the clips of the checks

    def step(seen: int) -> tuple[int, dict[str, float]]:
        clips = [training_clip(TRAIN_SEED, n) for n in range(seen, seen + size)]
        visible = part if seen < full_from * total else None
        pooled, told, numbers, known = seen_clips(model, clips, visible, device)
        turns = [draw_video_turns(c, random_state(c.key, "turns")) for c in clips]
        squeeze = [draw_video_squeeze(random_state(c.key, "squeeze")) for c in clips]
        batch = pack_video(list(numbers), turns, known, squeeze)
        projected = projector(pooled)
        fit = fit_loss(symbols, projected, told)
        loss, facts, _ = video_answer_loss(model, hints, projected, batch)
        (loss + FIT * fit).backward()
        more = [training_clip(TRAIN_SEED, 10**6 + n) for n in range(seen, seen + size)]
        label, place, texture, batch = symbolic_clips(more, 1.0)
        visual = symbols(label.to(device), place.to(device), texture.to(device, torch.bfloat16))
        loss, symbolic, _ = video_answer_loss(model, hints, visual, batch)
        loss.backward()
        return size, facts | {"fit": float(fit.detach()), "symbols right": symbolic["right"]}

    def evaluate(number: int = 12) -> dict[str, Any]:
        rights, tasks = [], []
        with torch.no_grad():
            if not kept:
                for first in range(0, number, size):
                    for task in TASKS:
                        clips = [make_clip(CHECK_SEED, n, task) for n in range(first, first + size)]
                        kept.append((clips, seen_clips(model, clips, None, device)[0]))
            for clips, pooled in kept:
                batch = pack_clips(clips)
                rights += video_answer_loss(model, hints, projector(pooled), batch)[2]
                tasks += batch.tasks
        return {"check": per_task(rights, tasks)}

    phase.run(step, evaluate, every=240)


def pack_clips(clips: list[Clip]) -> Any:
    """What each clip was made for, asked behind all its blocks."""
    turns = [[turn(c, c.task, c.question, c.answer)] for c in clips]
    every = [np.arange(c.frames * TOKENS) for c in clips]
    hints = []
    for clip in clips:
        frames = range(clip.frames)
        hints.append(np.concatenate([token_hints(clip, f, frame_labels(clip, f)) for f in frames]))
    return pack_video(every, turns, hints, [1.0] * len(clips))
