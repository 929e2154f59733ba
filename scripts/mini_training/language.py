"""Phase 1: the language model learns the questions on symbols instead of pixels.

A patch is the sum of embeddings of what it shows (see labels.py), of its row and column, and of
its texture, which means nothing and is there so that it can be ignored later. Rendering and vision
cost nothing here, and the sequence holds what matters and a little ground, so that a scene takes a
tenth of the time of a picture. Phase 3 then maps real patches to these same embeddings.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_training.hints import AFTER, HintHeads
from mini_training.labels import FIELDS, TEXTURE, patch_labels
from mini_training.loop import Phase, per_task
from mini_training.optimizer import Optimizer
from mini_training.packing import HEAD
from mini_training.symbols import Symbols
from mini_training.turns import Sequences, draw_squeeze, draw_turns, pack
from tokprune.eval.benchmarks.mini.scene import Scene, make_scene, random_state

#: seeds of the scene streams; the benchmark's splits use others (see evals/mini)
TRAIN_SEED, CHECK_SEED = 1, 2
TURNS = 24
#: a batch with this share of right turns makes the next ones harder, by this much
READY, PACE = 0.7, 0.004


def easier(scene: Scene, level: float) -> Scene:
    """The scene with part of its objects and plates: 3 and 1 at level 0, all at level 1. Looking a
    word up among ten patches is learnt in minutes, among a hundred it is not even begun."""
    things, plates = (round(least + level * (most - least)) for least, most in ((3, 20), (1, 4)))
    return replace(scene, things=scene.things[:things], plates=scene.plates[:plates],
                   distractors=scene.distractors[: round(6 * level)])  # fmt: skip


def sample_patches(label: np.ndarray, rng: np.random.RandomState, level: float) -> np.ndarray:
    """Patch numbers: the one that stands for each object, at level 1 a third of the others and
    some ground."""
    role, kind = label[:, 3], label[:, 0]
    ground = rng.uniform(2, 8 + 88 * level) / 420
    chance = np.where(role == 1, 1.0, np.where(kind > 0, 0.35 * level, ground))
    return np.flatnonzero(rng.rand(len(label)) < chance)


def answer_loss(
    model: Any, hints: HintHeads, visual: Tensor, batch: Sequences
) -> tuple[Tensor, dict[str, float], list[bool]]:
    """Cross-entropy of answers and hints; how well they go; which turns greedy decoding gets right.

    Args:
        visual: [B, V, width] embeddings of the visual tokens.
    """
    language, embed = model.model.language_model, model.get_input_embeddings()
    device = visual.device
    head = torch.tensor(HEAD, device=device).expand(visual.shape[0], -1)
    inputs = torch.cat([embed(head), visual, embed(batch.text.to(device))], dim=1)
    output = language(
        inputs_embeds=inputs,
        attention_mask=batch.mask.to(device),
        position_ids=batch.position.to(device),
        use_cache=False,
        output_hidden_states=True,
    )
    hidden = output.last_hidden_state
    logits = model.lm_head(hidden[batch.row.to(device), batch.column.to(device)]).float()
    target = batch.target.to(device)
    answers = F.cross_entropy(logits, target)
    wrong = torch.zeros(len(batch.tasks), device=device)
    wrong.index_add_(0, batch.turn.to(device), (logits.argmax(-1) != target).float())
    right = (wrong == 0).tolist()
    at = batch.hint_at.to(device)
    halfway = output.hidden_states[AFTER][at[:, 0], at[:, 1]]
    hinted, known = hints(halfway, batch.hint.to(device))
    told = {"answer": float(answers.detach()), "right": sum(right) / len(right), "hints": known}
    return answers + 0.2 * hinted, told, right


def symbolic_batch(
    seed: int, first: int, size: int, level: float
) -> tuple[Tensor, Tensor, Sequences]:
    """Labels [B, V, fields], textures [B, V, TEXTURE] and turns of scenes ``first`` on."""
    labels, patches, turns, textures, squeeze = [], [], [], [], []
    for number in range(first, first + size):
        scene = easier(make_scene(seed, number), level)
        rng = random_state(scene.key, "symbols")
        label = patch_labels(scene)
        own = sample_patches(label, rng, level)
        labels.append(label[own])
        textures.append(rng.normal(size=(len(own), TEXTURE)))
        patches.append(own)
        turns.append(draw_turns(scene, rng, TURNS, level))
        squeeze.append(draw_squeeze(rng))
    batch = pack(patches, turns, squeeze)
    label = np.zeros((size, batch.patch.shape[1], len(FIELDS)), dtype=np.int64)
    texture = np.zeros((size, batch.patch.shape[1], TEXTURE), dtype=np.float32)
    for b, (own, noise) in enumerate(zip(labels, textures)):
        label[b, : len(own)], texture[b, : len(own)] = own, noise
    return torch.from_numpy(label), torch.from_numpy(texture), batch


def language_phase(
    model: Any, symbols: nn.Module, hints: nn.Module, folder: Path, total: int, lr: float,
    device: Any,
) -> Phase:  # fmt: skip
    """A phase that trains the decoder and its hint heads, all moved to where it runs."""
    model.to(device, torch.bfloat16).train()
    symbols.to(device, torch.bfloat16)
    hints.to(device, torch.bfloat16)
    language = model.model.language_model
    # the token embeddings stay: visual tokens speak in them too
    language.embed_tokens.weight.requires_grad_(False)
    named = [(f"language.{n}", p) for n, p in language.named_parameters()]
    named += [(f"hints.{n}", p) for n, p in hints.named_parameters()]
    return Phase(folder, Optimizer(named, lr), total)


def train_language(
    model: Any, symbols: Symbols, folder: Path, total: int, lr: float, device: Any,
    size: int = 8, checked: int = 4,
) -> None:  # fmt: skip
    """Train the decoder on ``total`` scenes; a check takes ``checked`` batches."""
    hints = HintHeads(model.config.text_config.hidden_size)
    phase = language_phase(model, symbols, hints, folder, total, lr, device)

    def forward(
        seed: int, first: int, level: float
    ) -> tuple[Tensor, dict[str, float], list[bool], list[str]]:
        label, texture, batch = symbolic_batch(seed, first, size, level)
        visual = symbols(label.to(device), texture.to(device))
        return *answer_loss(model, hints, visual, batch), batch.tasks

    def step(seen: int) -> tuple[int, dict[str, float]]:
        loss, told, _, _ = forward(TRAIN_SEED, seen, phase.level)
        loss.backward()
        if told["right"] > READY:  # harder as soon as this is mastered
            phase.level = round(min(1.0, phase.level + PACE), 6)
        return size, told

    def evaluate() -> dict[str, Any]:
        out = {}
        for name, level in (("now", phase.level), ("check", 1.0)):
            rights, tasks = [], []
            with torch.no_grad():
                for first in range(0, checked * size, size):
                    _, _, right, own = forward(CHECK_SEED, first, level)
                    rights += right
                    tasks += own
            out[name] = per_task(rights, tasks)
        return out

    phase.run(step, evaluate)
