"""Question–answer turns of one picture in a single sequence.

The prefix (start, ``user :``, patches) comes first, then every turn. A turn sees the prefix and
itself, and its positions start right after the prefix: each equals a single-turn prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evals.mini.questions import TASKS, ask
from evals.mini.scene import Scene
from evals.mini.world import GRID
from mini_training.hints import HINTS, hints_of
from mini_training.model import BOS, EOS, PAD, encode

HEAD = (BOS, *encode("user :"))
TAIL = encode("assistant :")
#: how often each type is drawn; from level HARD of a curriculum on, the slow learners more often
WEIGHT = {"presence": 1.0, "attribute": 0.8, "color": 0.8, "shape": 1.0, "count": 1.6, "tally": 1.4,
          "size": 1.2, "where": 1.0, "relation": 1.6, "number": 0.8, "word": 1.0,
          "plate": 1.4}  # fmt: skip
LATER = {"presence": 0.8, "attribute": 0.4, "color": 0.4, "shape": 0.4, "count": 2.4, "tally": 2.2,
         "size": 0.5, "where": 0.4, "relation": 2.0, "number": 0.4, "word": 1.2,
         "plate": 1.8}  # fmt: skip
HARD = 0.5
PATCHES = GRID * GRID


@dataclass
class Turn:
    """``hints``: (number of the question's token, field → value), see hints.py."""

    task: str
    question: list[int]
    answer: list[int]
    hints: list[tuple[int, dict[str, int]]]


def draw_turns(
    scene: Scene, rng: np.random.RandomState, number: int, level: float = 1.0
) -> list[Turn]:
    """Turns about a scene; no question twice."""
    weight = LATER if level >= HARD else WEIGHT
    share = np.array([weight[t] for t in TASKS])
    share = np.cumsum(share / share.sum())
    turns, seen = [], set()
    for _ in range(3 * number):
        task = TASKS[int(np.searchsorted(share, rng.rand(), side="right"))]
        pair = ask(scene, task, rng)
        if pair is not None and pair[0] not in seen:
            seen.add(pair[0])
            question, answer = [*encode(pair[0]), *TAIL], [*encode(pair[1]), EOS]
            turns.append(Turn(task, question, answer, hints_of(scene, pair[0])))
            if len(turns) == number:
                break
    return turns


@dataclass
class Sequences:
    """A batch of packed sequences.

    ``patch`` [B, V]: patch numbers of the visual tokens, −1 padding; ``text`` [B, T]: ids of all
    turns; ``position`` [B, L] and ``mask`` [B, 1, L, L] (True: may attend) for L = head + V + T;
    ``row``, ``column`` [A]: where in the sequence each answer token is predicted; ``target`` [A];
    ``turn`` [A]: number of its turn in ``tasks``; ``hint_at`` [H, 2]: (row, column) of words with
    hints, ``hint`` [H, len(HINTS)], −100 where nothing is known.
    """

    patch: Tensor
    text: Tensor
    position: Tensor
    mask: Tensor
    row: Tensor
    column: Tensor
    target: Tensor
    turn: Tensor
    hint_at: Tensor
    hint: Tensor
    tasks: list[str]


def draw_squeeze(rng: np.random.RandomState) -> float:
    """A factor for the positions of patches, 1 for two pictures in five; see :func:`pack`."""
    return 1.0 if rng.rand() < 0.4 else float(np.exp(rng.uniform(np.log(1 / 36), 0)))


def pack(
    patches: list[np.ndarray], turns: list[list[Turn]], squeeze: list[float] | None = None
) -> Sequences:
    """Pack turns behind the given patches (in raster order) of each picture.

    Args:
        patches: numbers of the patches, per picture.
        turns: what is asked, per picture.
        squeeze: factor per picture for the rotary positions of its patches, so that they fill
            fewer places than there are patches; the text follows right behind. No patch is left
            out: it keeps the model from depending on the length of the sequence, as language
            models that were trained on texts of all lengths do not.
    """
    batch, head = len(patches), len(HEAD)
    visual = max(len(p) for p in patches)
    lengths = [sum(len(t.question) + len(t.answer) - 1 for t in row) for row in turns]
    text_length = -(-max(lengths) // 8) * 8
    patch = np.full((batch, visual), -1, dtype=np.int64)
    text = np.full((batch, text_length), PAD, dtype=np.int64)
    # −1: prefix; −2: padding; else the number of the turn
    segment = np.full((batch, head + visual + text_length), -2, dtype=np.int64)
    position = np.zeros_like(segment)
    row, column, target, turn_of, tasks = [], [], [], [], []
    hint_at, hint = [], []
    factors = [1.0] * batch if squeeze is None else squeeze
    for b, (own, dialogue, factor) in enumerate(zip(patches, turns, factors)):
        text_at = head + int(np.ceil(PATCHES * factor))
        patch[b, : len(own)] = own
        segment[b, : head + len(own)] = -1
        position[b, :head] = np.arange(head)
        position[b, head : head + len(own)] = head + (own * factor).astype(np.int64)
        at = 0
        for turn in dialogue:
            question, answer = turn.question, turn.answer
            ids = [*question, *answer[:-1]]
            start = head + visual + at
            text[b, at : at + len(ids)] = ids
            segment[b, start : start + len(ids)] = len(tasks)
            position[b, start : start + len(ids)] = text_at + np.arange(len(ids))
            first = start + len(question) - 1
            row += [b] * len(answer)
            column += range(first, first + len(answer))
            target += answer
            turn_of += [len(tasks)] * len(answer)
            tasks.append(turn.task)
            for i, told in turn.hints:
                hint_at.append((b, start + i))
                hint.append([told.get(name, -100) for name in HINTS])
            at += len(ids)
    same = torch.from_numpy(segment)
    mask = (same[:, :, None] == same[:, None, :]) | (same == -1)[:, None, :]
    mask &= torch.ones(mask.shape[1:], dtype=torch.bool).tril()
    return Sequences(
        torch.from_numpy(patch), torch.from_numpy(text), torch.from_numpy(position), mask[:, None],
        *(torch.tensor(x) for x in (row, column, target, turn_of)),
        torch.tensor(hint_at).view(-1, 2), torch.tensor(hint).view(-1, len(HINTS)), tasks,
    )  # fmt: skip
