"""Questions about one clip, drawn for training, and packed into single sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mini_training.model import EOS
from mini_training.packing import TAIL, Packed, pack_turns
from mini_training.video_hints import TOKEN_HINTS, WORD_HINTS, phase_of, way_of
from mini_training.video_labels import TOKENS
from mini_training.video_model import encode
from tokprune.eval.benchmarks.mini.world import KINDS
from tokprune.eval.benchmarks.mini_video.clip import DIRECTIONS, FRAMES, Clip
from tokprune.eval.benchmarks.mini_video.make import MOST

#: at most this many questions of each of these types
DIRECTION_TURNS, FIRST_TURNS = 4, 4


@dataclass
class VideoTurn:
    """``hints``: (number of the question's token, values of WORD_HINTS)."""

    task: str
    question: list[int]
    answer: list[int]
    hints: list[tuple[int, tuple[int, int]]]


def turn(clip: Clip, task: str, question: str, answer: str) -> VideoTurn:
    words = question.split()
    told = {a.name: (way_of(a), phase_of(a, clip.frames)) for a in clip.actors}
    hints = []
    for i, word in enumerate(words):
        if word in KINDS:
            name = word if word in told else f"{words[i - 1]} {word}"
            if name in told:
                hints.append((i, told[name]))
    return VideoTurn(task, [*encode(question), *TAIL], [*encode(answer), EOS], hints)


def draw_video_turns(clip: Clip, rng: np.random.RandomState) -> list[VideoTurn]:
    """All that the clip answers of the benchmark's questions, a few of each type."""
    pairs: list[tuple[str, str, str]] = []
    if clip.task == "appeared":
        count = sum(actor.seen[0] > 0 and actor.seen[1] > actor.seen[0] for actor in clip.actors)
        assert 1 <= count <= MOST
        pairs.append(("appeared", "how many objects appeared ?", str(count)))
    elif clip.task == "flashed":
        (text,) = (s.plate.text for s in clip.signs if s.seen[0] > 0)
        pairs.append(("flashed", "what text flashed ?", text))
    else:
        moving = [a for a in clip.actors if a.step != (0, 0)]
        shapes = [a for a in moving if a.color]
        if len(shapes) == 1:
            pairs.append(("moved", "which shape moved ?", shapes[0].name))
        for i in rng.permutation(len(moving))[:DIRECTION_TURNS]:
            way = list(DIRECTIONS)[way_of(moving[i]) - 1]
            ways = "left or right" if way in ("left", "right") else "up or down"
            pairs.append(("direction", f"did the {moving[i].name} move {ways} ?", way))
        early = [a for a in moving if phase_of(a, clip.frames) == 2]
        late = [a for a in moving if phase_of(a, clip.frames) == 3]
        both = [(a, b) for a in early for b in late]
        for i in rng.permutation(len(both))[:FIRST_TURNS]:
            a, b = both[i] if rng.rand() < 0.5 else both[i][::-1]
            question = f"which moved first , the {a.name} or the {b.name} ?"
            pairs.append(("first", question, both[i][0].name))
    return [turn(clip, *pair) for pair in pairs]


@dataclass
class VideoSequences(Packed):
    """Packed turns about clips. ``token_hint`` [B, V, TOKEN_HINTS], ``hint`` [H, WORD_HINTS]."""

    token_hint: Tensor
    hint: Tensor


def draw_video_squeeze(rng: np.random.RandomState) -> float:
    """A factor for the positions of visual tokens, 1 for two clips in three; see
    :func:`mini_training.packing.pack_turns`."""
    return 1.0 if rng.rand() < 2 / 3 else float(np.exp(rng.uniform(np.log(1 / 8), 0)))


def pack_video(
    tokens: list[np.ndarray], turns: list[list[VideoTurn]], hints: list[np.ndarray],
    squeeze: list[float],
) -> VideoSequences:  # fmt: skip
    """Pack turns behind visual tokens.

    Args:
        tokens: their numbers in the clip (frame · TOKENS + block), in order; turns: what is asked;
        hints: [V, TOKEN_HINTS]; squeeze: factor of the tokens' rotary positions; all per clip.
    """
    visual = -(-max(len(own) for own in tokens) // 8) * 8
    packed = pack_turns(tokens, visual, FRAMES * TOKENS, turns, squeeze)
    token_hint = np.full((len(tokens), visual, len(TOKEN_HINTS)), -100, dtype=np.int64)
    for b, own in enumerate(hints):
        token_hint[b, : len(own)] = own
    return VideoSequences(
        **vars(packed), token_hint=torch.from_numpy(token_hint),
        hint=torch.tensor(packed.told, dtype=torch.long).view(-1, len(WORD_HINTS)),
    )  # fmt: skip
