"""Phase 2: tower and projector learn to say what every patch shows.

The projected patch is fitted to the symbols that the language model learns on (symbols.py), and
auxiliary heads, thrown away afterwards, name each field from the tower's features. The class token
names what is in the scene. Early on the tower sees all objects but only part of the ground, at
its true places; the end of the phase runs on full pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_training.labels import FIELDS, patch_labels, patch_texture
from mini_training.loop import Phase
from mini_training.optimizer import Optimizer
from mini_training.symbols import Symbols
from tokprune.eval.benchmarks.mini.render import render
from tokprune.eval.benchmarks.mini.scene import Scene, make_scene
from tokprune.eval.benchmarks.mini.world import COLORS, KINDS, PLATES, SHAPES

TRAIN_SEED, CHECK_SEED = 1, 2
NAMED = ("kind", "color", "size", "role", "char", "plate", "place")
PRESENCE = len(KINDS) + len(SHAPES) * len(COLORS) + len(PLATES)


class Heads(nn.Module):
    """Auxiliary classifiers, used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fields = nn.ModuleDict({name: nn.Linear(width, FIELDS[name]) for name in NAMED})
        self.early = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, PRESENCE))
        self.last = nn.Linear(width, PRESENCE)


def pixels_of(scenes: list[Scene]) -> tuple[Tensor, np.ndarray]:
    """Normalised pixels [B, 3, SIDE, SIDE], as the processor makes them, and raw ones (uint8)."""
    raw = np.stack([np.asarray(render(scene)) for scene in scenes])
    pixels = torch.from_numpy(raw).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.25)
    return pixels, raw


def presence(scenes: list[Scene]) -> Tensor:
    """[B, PRESENCE] 0 or 1: kinds, coloured shapes, plate colours."""
    target = torch.zeros(len(scenes), PRESENCE)
    colors = list(COLORS)
    for b, scene in enumerate(scenes):
        for thing in scene.things:
            target[b, KINDS.index(thing.kind)] = 1
            if thing.color:
                pair = SHAPES.index(thing.kind) * len(COLORS) + colors.index(thing.color)
                target[b, len(KINDS) + pair] = 1
        for plate in scene.plates:
            target[b, PRESENCE - len(PLATES) + list(PLATES).index(plate.color)] = 1
    return target


def tower_features(
    model: Any, pixels: Tensor, patch: Tensor | None = None, last: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Hidden states [B, 1 + n, width] at LLaVA's feature layer, and the pooled class token.

    Args:
        patch: [B, n] numbers of the patches to run, at their own positions; None: all.
        last: run the layers after the feature layer too (only the class token uses them).
    """
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    hidden = tower.embeddings(pixels)
    if patch is not None:
        index = torch.cat([torch.zeros_like(patch[:, :1]), patch + 1], dim=1)
        hidden = hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[2]))
    hidden = tower.pre_layrnorm(hidden)
    layers = tower.encoder.layers
    for layer in layers[:-1]:
        hidden = _run(layer, hidden)
    if not last:
        return hidden, None
    final = _run(layers[-1], hidden)
    return hidden, tower.post_layernorm(final[:, 0])


def _run(layer: Any, hidden: Tensor) -> Tensor:
    """One block of the tower; transformers 4.57 wants a second mask and answers with a tuple."""
    names = inspect.signature(type(layer).forward).parameters
    masks = {name: None for name in ("attention_mask", "causal_attention_mask") if name in names}
    output = layer(hidden, **masks)
    return output[0] if isinstance(output, tuple) else output


def choose_patches(kind: np.ndarray, number: int, rng: np.random.RandomState) -> np.ndarray:
    """Every patch of an object, and random ground up to ``number``; in raster order."""
    ground = rng.permutation(np.flatnonzero(kind == 0))
    things = rng.permutation(np.flatnonzero(kind > 0))[:number]
    return np.sort(np.concatenate([things, ground[: number - len(things)]]))


def train_vision(
    model: Any, symbols: Symbols, folder: Path, total: int, lr: float, device: Any,
    size: int = 16, part: int = 240, full_from: float = 0.85,
) -> None:  # fmt: skip
    """Train tower and projector on ``total`` scenes; full pictures from ``full_from`` on."""
    model.to(device, torch.bfloat16).train()
    symbols.to(device, torch.bfloat16).eval()
    heads = Heads(model.config.vision_config.hidden_size).to(device, torch.bfloat16)
    base = model.model
    named = [(f"tower.{n}", p) for n, p in base.vision_tower.named_parameters()]
    named += [(f"projector.{n}", p) for n, p in base.multi_modal_projector.named_parameters()]
    named += [(f"heads.{n}", p) for n, p in heads.named_parameters()]
    phase = Phase(folder, Optimizer(named, lr), total)

    def forward(seed: int, first: int, number: int | None) -> tuple[Tensor, dict[str, float]]:
        scenes = [make_scene(seed, i) for i in range(first, first + size)]
        pixels, raw = pixels_of(scenes)
        label = np.stack([patch_labels(scene) for scene in scenes])
        texture = np.stack([patch_texture(picture) for picture in raw])
        patch = None
        if number is not None:
            rng = np.random.RandomState(first % 2**31)
            chosen = np.stack([choose_patches(own[:, 0], number, rng) for own in label])
            label = np.take_along_axis(label, chosen[:, :, None], 1)
            texture = np.take_along_axis(texture, chosen[:, :, None], 1)
            patch = torch.from_numpy(chosen).to(device)
        hidden, pooled = tower_features(model, pixels.to(device, torch.bfloat16), patch, last=True)
        target = torch.from_numpy(label).to(device)
        _, loss, told = losses(base, heads, symbols, hidden, pooled, target,
                               torch.from_numpy(texture).to(device), scenes)  # fmt: skip
        return loss, told

    run_vision(phase, forward, size, part, full_from, checked=4)


def run_vision(
    phase: Phase, forward: Callable[[int, int, int | None], tuple[Tensor, dict[str, float]]],
    size: int, part: int, full_from: float, checked: int,
) -> None:  # fmt: skip
    """Run a phase that sees parts of its pictures at first and all of them from ``full_from`` on.

    Args:
        forward: (seed, first, number of parts to see or None) → loss and how it goes.
        checked: batches of a check.
    """

    def step(seen: int) -> tuple[int, dict[str, float]]:
        visible = part if seen < full_from * phase.total else None
        loss, told = forward(TRAIN_SEED, seen, visible)
        loss.backward()
        return size, told

    def evaluate() -> dict[str, Any]:
        with torch.no_grad():
            told = [forward(CHECK_SEED, first, None)[1] for first in range(0, checked * size, size)]
        return {"check": {k: round(sum(t[k] for t in told) / len(told), 3) for k in told[0]}}

    phase.run(step, evaluate)


def losses(
    base: Any, heads: Heads, symbols: Symbols, hidden: Tensor, pooled: Tensor | None, label: Tensor,
    texture: Tensor, scenes: list[Scene],
) -> tuple[Tensor, Tensor, dict[str, float]]:  # fmt: skip
    """Projected patches; the loss of symbols, of fields per patch and of presence from the class
    token; and how well each goes."""
    features = hidden[:, 1:]
    things = label[..., 0] > 0
    weight = torch.where(things, 1.0, 0.25)
    weight = weight / weight.sum()
    want = symbols(label, texture).float()
    projected = base.multi_modal_projector(features)
    fit = ((projected.float() - want).square().mean(-1) * weight).sum() / want.var()
    total = fit
    told = {"fit": float(fit.detach())}
    normed = heads.norm(features)
    right = torch.ones_like(things)
    for i, name in enumerate(FIELDS):
        if name not in NAMED:
            continue
        logits = heads.fields[name](normed).float()
        error = F.cross_entropy(logits.transpose(1, 2), label[..., i], reduction="none")
        total = total + (error * weight).sum()
        good = logits.argmax(-1) == label[..., i]
        right &= good
        told[name] = float(good[things].float().mean())
    told["all"] = float(right[things].float().mean())
    told["ground"] = float(right[~things].float().mean())
    present = presence(scenes).to(hidden.device)
    guesses = [heads.early(hidden[:, 0])] + ([] if pooled is None else [heads.last(pooled)])
    for logits in guesses:
        seen = F.binary_cross_entropy_with_logits(logits.float(), present)
        total = total + 2 * seen
        told["presence"] = float(seen.detach())
    return projected, total, told
