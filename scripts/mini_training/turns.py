"""Questions about one picture, drawn for training, and packed into single sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mini_training.hints import HINTS, hints_of
from mini_training.model import EOS, encode
from mini_training.packing import TAIL, Packed, pack_turns
from tokprune.eval.benchmarks.mini.questions import TASKS, ask
from tokprune.eval.benchmarks.mini.scene import Scene
from tokprune.eval.benchmarks.mini.world import GRID

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
class Sequences(Packed):
    """Packed turns about pictures. ``patch`` [B, V]: patch numbers of the visual tokens, −1
    padding; ``hint`` [H, len(HINTS)], −100 where nothing is known."""

    patch: Tensor
    hint: Tensor


def draw_squeeze(rng: np.random.RandomState) -> float:
    """A factor for the positions of patches, 1 for two pictures in five; see
    :func:`mini_training.packing.pack_turns`."""
    return 1.0 if rng.rand() < 0.4 else float(np.exp(rng.uniform(np.log(1 / 36), 0)))


def pack(
    patches: list[np.ndarray], turns: list[list[Turn]], squeeze: list[float] | None = None
) -> Sequences:
    """Pack turns behind the given patches (in raster order) of each picture."""
    visual = max(len(own) for own in patches)
    factors = [1.0] * len(patches) if squeeze is None else squeeze
    packed = pack_turns(patches, visual, PATCHES, turns, factors)
    patch = np.full((len(patches), visual), -1, dtype=np.int64)
    for b, own in enumerate(patches):
        patch[b, : len(own)] = own
    hint = [[told.get(name, -100) for name in HINTS] for told in packed.told]
    return Sequences(
        **vars(packed), patch=torch.from_numpy(patch),
        hint=torch.tensor(hint).view(-1, len(HINTS)),
    )  # fmt: skip
