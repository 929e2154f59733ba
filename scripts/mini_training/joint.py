"""Phase 3: tower, projector and language model together, on questions about real pictures.

The supervision of patches goes on beside the answers. No token is ever dropped for the sake of
compression: the first part of the phase leaves out ground that no question asks about (at true
positions, to save time), the second and longer part sees every patch. Every step also takes a batch
of symbols (phase 1), which teach the language model more per second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mini_training.hints import HintHeads
from mini_training.labels import patch_labels, patch_texture
from mini_training.language import answer_loss, symbolic_batch
from mini_training.loop import Phase, per_task
from mini_training.optimizer import Optimizer
from mini_training.symbols import Symbols
from mini_training.turns import PATCHES, draw_squeeze, draw_turns, pack
from mini_training.vision import Heads, choose_patches, losses, pixels_of, tower_features
from tokprune.eval.benchmarks.mini.scene import make_scene, random_state

#: other scenes than in the phases before; the benchmark's splits use further seeds
TRAIN_SEED, CHECK_SEED = 3, 2


def named_parameters(
    model: Any, heads: Heads, hints: HintHeads
) -> list[tuple[str, torch.nn.Parameter]]:
    """All that is trained, under the names of the phases before."""
    base = model.model
    return [
        *((f"tower.{n}", p) for n, p in base.vision_tower.named_parameters()),
        *((f"projector.{n}", p) for n, p in base.multi_modal_projector.named_parameters()),
        *((f"heads.{n}", p) for n, p in heads.named_parameters()),
        *((f"language.{n}", p) for n, p in base.language_model.named_parameters()),
        *((f"hints.{n}", p) for n, p in hints.named_parameters()),
    ]


def restore(model: Any, heads: Heads, hints: HintHeads, *folders: Path) -> None:
    """Weights of finished phases."""
    state: dict[str, Tensor] = {}
    for folder in folders:
        state |= load_file(folder / "state.safetensors")
    with torch.no_grad():
        for name, p in named_parameters(model, heads, hints):
            if (saved := state.get(f"master.{name}")) is not None:
                p.copy_(saved)


def train_joint(
    model: Any, symbols: Symbols, out: Path, total: int, lr: float, device: Any,
    size: int = 8, number: int = 14, part: int = 240, full_from: float = 0.35,
    checked: int = 4,
) -> None:  # fmt: skip
    """Train everything on ``total`` scenes; all patches from ``full_from`` on; a check takes
    ``checked`` batches."""
    heads = Heads(model.config.vision_config.hidden_size)
    hints = HintHeads(model.config.text_config.hidden_size)
    restore(model, heads, hints, out / "language", out / "vision")
    model.to(device, torch.bfloat16).train()
    symbols.to(device, torch.bfloat16)
    heads.to(device, torch.bfloat16)
    hints.to(device, torch.bfloat16)
    model.get_input_embeddings().weight.requires_grad_(False)
    # what lies behind the feature layer is not run here
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    for module in (tower.encoder.layers[-1], tower.post_layernorm, heads.last):
        module.requires_grad_(False)
    # a low rate that only falls: both halves have been polished already
    optimizer = Optimizer(named_parameters(model, heads, hints), lr)
    phase = Phase(out / "joint", optimizer, total, cooldown=0.95)

    def forward(
        seed: int, first: int, visible: int | None, vary: bool = True
    ) -> tuple[Tensor, dict[str, float], list[bool], list[str]]:
        scenes = [make_scene(seed, i) for i in range(first, first + size)]
        pixels, raw = pixels_of(scenes)
        label = np.stack([patch_labels(scene) for scene in scenes])
        texture = np.stack([patch_texture(picture) for picture in raw])
        turns = [draw_turns(s, random_state(s.key, "turns"), number) for s in scenes]
        patch, seen = None, [np.arange(PATCHES)] * size
        if visible is not None:
            seen = [
                choose_patches(own[:, 0], visible, random_state(s.key, "patches"))
                for own, s in zip(label, scenes)
            ]
            chosen = np.stack(seen)
            label = np.take_along_axis(label, chosen[:, :, None], 1)
            texture = np.take_along_axis(texture, chosen[:, :, None], 1)
            patch = torch.from_numpy(chosen).to(device)
        hidden, _ = tower_features(model, pixels.to(device, torch.bfloat16), patch)
        visual, aux, seen_right = losses(
            model.model, heads, symbols, hidden, None, torch.from_numpy(label).to(device),
            torch.from_numpy(texture).to(device), scenes,
        )  # fmt: skip
        squeeze = [draw_squeeze(random_state(s.key, "squeeze")) if vary else 1.0 for s in scenes]
        batch = pack(seen, turns, squeeze)
        loss, told, right = answer_loss(model, hints, visual, batch)
        told |= {"all": seen_right["all"], "fit": seen_right["fit"]}
        return loss + 0.3 * aux, told, right, batch.tasks

    def step(seen: int) -> tuple[int, dict[str, float]]:
        loss, told, _, _ = forward(TRAIN_SEED, seen, part if seen < full_from * total else None)
        loss.backward()
        label, texture, batch = symbolic_batch(TRAIN_SEED, seen, size, 1.0)
        symbolic, _, right = answer_loss(
            model, hints, symbols(label.to(device), texture.to(device)), batch
        )
        symbolic.backward()
        told["symbols right"] = sum(right) / len(right)
        return size, told

    def evaluate() -> dict[str, Any]:
        out = {}
        for name, vary in (("check", False), ("squeezed", True)):
            rights, tasks = [], []
            with torch.no_grad():
                for first in range(0, checked * size, size):
                    _, _, right, own = forward(CHECK_SEED, first, None, vary)
                    rights += right
                    tasks += own
            out[name] = per_task(rights, tasks)
        return out

    phase.run(step, evaluate)
