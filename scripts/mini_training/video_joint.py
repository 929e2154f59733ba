"""Phase 3 of the video model: questions about real frames, and symbols beside them.

Tower and projector stay as phase 1 left them: with the answers' gradient in the tower, it forgot
within 500 clips what it had learnt. Most of the phase leaves ground out (at true positions, to save
time), the last part sees every block.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mini_training.loop import Phase, per_task
from mini_training.optimizer import Optimizer
from mini_training.video_hints import token_hints
from mini_training.video_labels import TOKENS, frame_labels
from mini_training.video_language import NOISE, Hints, symbolic_clips, video_answer_loss
from mini_training.video_scenes import training_clip
from mini_training.video_symbols import VideoSymbols
from mini_training.video_turns import draw_video_squeeze, draw_video_turns, pack_video, turn
from mini_training.video_vision import (
    choose_blocks,
    normalised,
    pooled_features,
)
from tokprune.eval.benchmarks.mini.scene import random_state
from tokprune.eval.benchmarks.mini_video.clip import TASKS, Clip
from tokprune.eval.benchmarks.mini_video.make import make_clip
from tokprune.eval.benchmarks.mini_video.render import render

#: other clips than in the phases before; the benchmark's splits use further seeds
TRAIN_SEED, CHECK_SEED = 3, 2


def named_parameters(
    model: Any, hints: Hints | None = None
) -> list[tuple[str, torch.nn.Parameter]]:
    """All parts, under the names of the phases before."""
    parts = {
        "tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language": model.model.language_model,
        "hints": hints,
    }
    return [
        (f"{part}.{name}", p)
        for part, module in parts.items()
        if module is not None
        for name, p in module.named_parameters()
    ]


def restore_video(model: Any, *folders: Path, hints: Hints | None = None) -> None:
    """Weights of finished phases, from their float32 masters; later ones over earlier ones."""
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
) -> tuple[Tensor, np.ndarray, list[np.ndarray]]:
    """The tower on rendered clips: pooled features [B, V, width] of blocks; their numbers [B, V];
    their hints [V, …] per clip.

    Args:
        part: blocks of a frame to run; None: all.
    """
    pooled, numbers, hints = [], [], []
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
        numbers.append((np.arange(clip.frames)[:, None] * TOKENS + every).ravel())
        hints.append(
            np.concatenate([token_hints(clip, f, labels[f])[every[f]] for f in range(clip.frames)])
        )
    return torch.stack(pooled), np.stack(numbers), hints


def train_video_joint(
    model: Any, symbols: VideoSymbols, out: Path, total: int, lr: float, device: Any,
    size: int = 6, extra: int = 2, part: int = 64, full_from: float = 0.9, checked: int = 6,
) -> None:  # fmt: skip
    """Train the language model on ``total`` clips; all blocks from ``full_from`` on. A step takes
    ``size`` clips as the tower sees them and ``extra`` of symbols; a check, ``checked`` clips of
    every type."""
    hints = Hints(model.config.text_config.hidden_size)
    restore_video(model, out / "vision", out / "language", hints=hints)
    for module in (model.train(), hints, symbols):
        module.to(device, torch.bfloat16)
    model.get_input_embeddings().weight.requires_grad_(False)
    projector = model.model.multi_modal_projector
    for module in (model.model.vision_tower, projector):
        module.requires_grad_(False)
    phase = Phase(out / "joint", Optimizer(named_parameters(model, hints), lr), total, cooldown=0.7)

    def step(seen: int) -> tuple[int, dict[str, float]]:
        clips = [training_clip(TRAIN_SEED, n) for n in range(seen, seen + size)]
        visible = part if seen < full_from * total else None
        pooled, numbers, known = seen_clips(model, clips, visible, device)
        turns = [draw_video_turns(c, random_state(c.key, "turns")) for c in clips]
        squeeze = [draw_video_squeeze(random_state(c.key, "squeeze")) for c in clips]
        batch = pack_video(list(numbers), turns, known, squeeze)
        loss, facts, _ = video_answer_loss(model, hints, projector(pooled), batch)
        loss.backward()
        more = [training_clip(TRAIN_SEED, 10**6 + n) for n in range(seen, seen + extra)]
        label, place, texture, batch = symbolic_clips(more, 1.0)
        visual = symbols(label.to(device), place.to(device), texture.to(device, torch.bfloat16))
        visual = visual + NOISE * torch.randn_like(visual)
        loss, symbolic, _ = video_answer_loss(model, hints, visual, batch)
        (loss * extra / size).backward()
        return size, facts | {"symbols right": symbolic["right"]}

    def evaluate() -> dict[str, Any]:
        rights, tasks = [], []
        with torch.no_grad():
            for task in TASKS:
                clips = [make_clip(CHECK_SEED, n, task) for n in range(checked)]
                visual = projector(seen_clips(model, clips, None, device)[0])
                batch = pack_clips(clips)
                rights += video_answer_loss(model, hints, visual, batch)[2]
                tasks += batch.tasks
        return {"check": per_task(rights, tasks)}

    phase.run(step, evaluate, every=300)


def pack_clips(clips: list[Clip]) -> Any:
    """What each clip was made for, asked behind all its blocks."""
    turns = [[turn(c, c.task, c.question, c.answer)] for c in clips]
    every = [np.arange(c.frames * TOKENS) for c in clips]
    hints = []
    for clip in clips:
        frames = range(clip.frames)
        hints.append(np.concatenate([token_hints(clip, f, frame_labels(clip, f)) for f in frames]))
    return pack_video(every, turns, hints, [1.0] * len(clips))
