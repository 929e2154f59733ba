"""Question–answer turns of pictures or clips in single sequences.

The prefix (start, ``user :``, visual tokens) comes first, then every turn. A turn sees the prefix
and itself, and its positions start right after the prefix: each equals a single-turn prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mini_training.model import BOS, PAD, encode

HEAD = (BOS, *encode("user :"))
TAIL = encode("assistant :")


@dataclass
class Packed:
    """A batch of packed sequences.

    ``text`` [B, T]: ids of all turns; ``position`` [B, L] and ``mask`` [B, 1, L, L] (True: may
    attend) for L = head + V + T, V visual tokens; ``row``, ``column`` [A]: where in the sequence
    each answer token is predicted; ``target`` [A]; ``turn`` [A]: number of its turn in ``tasks``;
    ``hint_at`` [H, 2]: (row, column) of words with hints, ``told``: their hints.
    """

    text: Tensor
    position: Tensor
    mask: Tensor
    row: Tensor
    column: Tensor
    target: Tensor
    turn: Tensor
    hint_at: Tensor
    told: list[Any]
    tasks: list[str]


def pack_turns(
    tokens: Sequence[np.ndarray], visual: int, whole: int, turns: Sequence[Sequence[Any]],
    squeeze: Sequence[float],
) -> Packed:  # fmt: skip
    """Pack turns behind the visual tokens of each picture or clip.

    Args:
        tokens: numbers of the visual tokens that are there, in order.
        visual: places for them in a sequence, V.
        whole: visual tokens where none is left out.
        turns: what is asked: ``task``, ``question``, ``answer``, ``hints`` (number of a token of
            the question, anything).
        squeeze: factor for the rotary positions of the visual tokens, so that they fill fewer
            places than there are tokens; the text follows right behind. No token is left out: it
            keeps the model from depending on the length of the sequence, as language models that
            were trained on texts of all lengths do not.
    """
    batch, head = len(tokens), len(HEAD)
    lengths = [sum(len(t.question) + len(t.answer) - 1 for t in row) for row in turns]
    text_length = -(-max(lengths) // 8) * 8
    text = np.full((batch, text_length), PAD, dtype=np.int64)
    # −1: prefix; −2: padding; else the number of the turn
    segment = np.full((batch, head + visual + text_length), -2, dtype=np.int64)
    position = np.zeros_like(segment)
    row, column, target, turn_of, tasks = [], [], [], [], []
    hint_at, hint = [], []
    for b, (own, dialogue, factor) in enumerate(zip(tokens, turns, squeeze)):
        text_at = head + int(np.ceil(whole * factor))
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
                hint.append(told)
            at += len(ids)
    same = torch.from_numpy(segment)
    mask = (same[:, :, None] == same[:, None, :]) | (same == -1)[:, None, :]
    mask &= torch.ones(mask.shape[1:], dtype=torch.bool).tril()
    return Packed(
        torch.from_numpy(text), torch.from_numpy(position), mask[:, None],
        *(torch.tensor(x) for x in (row, column, target, turn_of)),
        torch.tensor(hint_at, dtype=torch.long).view(-1, 2), hint, tasks,
    )  # fmt: skip
