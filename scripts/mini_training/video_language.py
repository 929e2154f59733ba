"""Phase 2 of the video model: the language model learns the questions on symbols of clips.

No pixels: a block is the sum of embeddings of what it shows (video_symbols.py). The sequence holds
what matters, parts of the rest and a little ground, at the positions of the full clip.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mini_training.labels import TEXTURE
from mini_training.language import language_phase
from mini_training.loop import per_task
from mini_training.packing import HEAD
from mini_training.video_hints import TOKEN_HINTS, WORD_HINTS, VideoHintHeads, token_hints
from mini_training.video_labels import NAMED, TOKENS, frame_labels
from mini_training.video_scenes import training_clip
from mini_training.video_symbols import VideoSymbols
from mini_training.video_turns import (
    VideoSequences,
    draw_video_squeeze,
    draw_video_turns,
    pack_video,
    turn,
)
from tokprune.eval.benchmarks.mini.scene import random_state
from tokprune.eval.benchmarks.mini_video.clip import TASKS, Clip
from tokprune.eval.benchmarks.mini_video.make import make_clip

TRAIN_SEED, CHECK_SEED = 1, 2
#: a batch of which this share of turns is right, over its types, makes the next ones harder
READY, PACE = 0.7, 0.008
#: from this level on, the positions of some clips are squeezed
SQUEEZED = 0.6
#: symbols, and the places of objects in pixels, are off by this much, as what the tower writes is
NOISE, PIXELS = 0.07, 1.5
TOKEN_WEIGHT, WORD_WEIGHT = 0.5, 0.2


class Hints(torch.nn.Module):
    """The heads of tokens and of words."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = VideoHintHeads(width, TOKEN_HINTS)
        self.word = VideoHintHeads(width, WORD_HINTS)


def video_answer_loss(
    model: Any, hints: Hints, visual: Tensor, batch: VideoSequences
) -> tuple[Tensor, dict[str, float], list[bool]]:
    """Cross-entropy of answers, each type alike, and of hints; how well they go; which turns greedy
    decoding gets right.

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
    layers = output.hidden_states
    logits = model.lm_head(
        output.last_hidden_state[batch.row.to(device), batch.column.to(device)]
    ).float()
    target = batch.target.to(device)
    error = F.cross_entropy(logits, target, reduction="none")
    kinds = torch.tensor([TASKS.index(task) for task in batch.tasks])[batch.turn].to(device)
    present = kinds.unique()
    answers = torch.stack([error[kinds == kind].mean() for kind in present]).mean()
    wrong = torch.zeros(len(batch.tasks), device=device)
    wrong.index_add_(0, batch.turn.to(device), (logits.argmax(-1) != target).float())
    right = (wrong == 0).tolist()
    rows, cols = torch.nonzero(batch.token_hint[..., 0] >= 0, as_tuple=True)
    told = batch.token_hint[rows, cols].to(device)
    # the frame of a few tokens is enough
    told[torch.rand(len(told), device=device) > 0.1, 0] = -100
    token, known = hints.token(layers, (rows.to(device), cols.to(device) + len(HEAD)), told)
    at = batch.hint_at.to(device)
    word, more = hints.word(layers, (at[:, 0], at[:, 1]), batch.hint.to(device))
    shares = per_task(right, batch.tasks)
    facts = {"answer": float(answers.detach()), "right": sum(shares.values()) / len(shares)}
    return answers + TOKEN_WEIGHT * token + WORD_WEIGHT * word, facts | known | more, right


def sample_blocks(label: np.ndarray, rng: np.random.RandomState, level: float) -> np.ndarray:
    """Every block that stands for something; some of the others and some ground."""
    ground = rng.uniform(1, 4 + 10 * level) / 100
    chance = np.where(label[:, 3] == 1, 1.0, np.where(label[:, 0] > 0, 0.3 * level, ground))
    return np.flatnonzero(rng.rand(len(label)) < chance)


def symbolic_clips(
    clips: list[Clip], level: float, asked: bool = False
) -> tuple[Tensor, Tensor, Tensor, VideoSequences]:
    """Labels, places and textures [B, V, …] and turns of clips.

    Args:
        asked: ask what the clip was made for, not all that it answers; positions are not squeezed.
    """
    labels, places, tokens, turns, hints, squeeze = [], [], [], [], [], []
    for clip in clips:
        rng = random_state(clip.key, f"symbols {clip.task}")
        own: dict[str, list[np.ndarray]] = {"label": [], "place": [], "token": [], "hint": []}
        for frame in range(clip.frames):
            seen = frame_labels(clip, frame)
            block = sample_blocks(seen.label, rng, level)
            own["label"].append(seen.label[block])
            own["place"].append(seen.place[block])
            own["token"].append(frame * TOKENS + block)
            own["hint"].append(token_hints(clip, frame, seen)[block])
        labels.append(np.concatenate(own["label"]))
        places.append(np.concatenate(own["place"]))
        tokens.append(np.concatenate(own["token"]))
        hints.append(np.concatenate(own["hint"]))
        if asked:
            turns.append([turn(clip, clip.task, clip.question, clip.answer)])
            squeeze.append(1.0)
        else:
            turns.append(draw_video_turns(clip, rng))
            squeeze.append(draw_video_squeeze(rng) if level >= SQUEEZED else 1.0)
    batch = pack_video(tokens, turns, hints, squeeze)
    shape = batch.token_hint.shape[:2]
    label = np.zeros((*shape, len(NAMED)), dtype=np.int64)
    place = np.zeros((*shape, 2), dtype=np.float32)
    for b in range(len(clips)):
        label[b, : len(labels[b])], place[b, : len(labels[b])] = labels[b], places[b]
    place += np.random.normal(0, PIXELS, place.shape) * (label[..., 3:4] == 1)
    texture = torch.randn(*shape, TEXTURE)
    return torch.from_numpy(label), torch.from_numpy(place), texture, batch


def train_video_language(
    model: Any, symbols: VideoSymbols, folder: Path, total: int, lr: float, device: Any,
    size: int = 8, checked: int = 40,
) -> None:  # fmt: skip
    """Train the decoder on ``total`` clips; a check takes ``checked`` of every type."""
    hints = Hints(model.config.text_config.hidden_size)
    phase = language_phase(model, symbols, hints, folder, total, lr, device)

    def forward(
        clips: list[Clip], level: float, asked: bool = False
    ) -> tuple[Tensor, dict[str, float], list[bool], list[str]]:
        label, place, texture, batch = symbolic_clips(clips, level, asked)
        visual = symbols(label.to(device), place.to(device), texture.to(device, torch.bfloat16))
        visual = visual + NOISE * torch.randn_like(visual)
        return *video_answer_loss(model, hints, visual, batch), batch.tasks

    def step(seen: int) -> tuple[int, dict[str, float]]:
        clips = [training_clip(TRAIN_SEED, n, phase.level) for n in range(seen, seen + size)]
        loss, told, _, _ = forward(clips, phase.level)
        loss.backward()
        if told["right"] > READY:  # harder as soon as this is mastered
            phase.level = round(min(1.0, phase.level + PACE), 6)
        return size, told

    def evaluate() -> dict[str, Any]:
        rights, tasks = [], []
        with torch.no_grad():
            for first in range(0, checked, size):
                for task in TASKS:
                    clips = [make_clip(CHECK_SEED, n, task) for n in range(first, first + size)]
                    _, _, right, own = forward(clips, 1.0, asked=True)
                    rights += right
                    tasks += own
        return {"check": per_task(rights, tasks)}

    phase.run(step, evaluate)
