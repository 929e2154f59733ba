"""Intermediate supervision of the video model: what its tokens should know halfway.

The answer to "did the house move up or down ?" compares two frames and looks a word up; it teaches
both only together. So small heads, thrown away afterwards, must say at every token that stands for
an object whether it is elsewhere than in the first frame, has come since, is on the move; at every
character whether its text is new; and at every name in a question what that object does.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_training.video_labels import TOKENS, FrameLabels
from tokprune.eval.benchmarks.mini_video.clip import DIRECTIONS, FRAMES, Actor, Clip

#: field → (values, decoder layers below its head); of visual tokens
#: since: 0 where it was in frame 0, 1…4 elsewhere by direction, 5 not there then; motion: 0 none so
#: far, 1 from the start and still, 2 over, 3 began later; text: 1 for one that was not in frame 0;
#: count: objects that have appeared, up to here in the frame; fresh: 1 for what was not there in
#: the frame before
TOKEN_HINTS = {
    "frame": (FRAMES, 2),
    "since": (6, 3),
    "motion": (4, 3),
    "text": (2, 3),
    "count": (6, 4),
    "fresh": (2, 2),
}
#: of names in questions
WORD_HINTS = {"way": (5, 4), "phase": (4, 4)}
_WAY = {step: i + 1 for i, step in enumerate(DIRECTIONS.values())}


def way_of(actor: Actor) -> int:
    """0 at rest, 1…4 in the order of DIRECTIONS."""
    return _WAY.get((int(np.sign(actor.step[0])), int(np.sign(actor.step[1]))), 0)


def phase_of(actor: Actor, frames: int) -> int:
    """0 at rest, 1 moving all the time, 2 early, 3 late."""
    if actor.step == (0, 0):
        return 0
    return 1 if actor.moves == (0, frames - 1) else 2 if actor.moves[0] == 0 else 3


def token_hints(clip: Clip, frame: int, labels: FrameLabels) -> np.ndarray:
    """[TOKENS, TOKEN_HINTS] int64, −100 where there is nothing to know."""
    out = np.full((TOKENS, len(TOKEN_HINTS)), -100, dtype=np.int64)
    out[:, 0] = frame
    come = 0
    for token in np.flatnonzero((labels.actor >= 0) | (labels.sign >= 0)):
        if (number := labels.actor[token]) >= 0:
            actor = clip.actors[number]
            new = actor.seen[0] > 0
            come += new
            moved = actor.moves[0] < frame and actor.step != (0, 0)
            if clip.task == "appeared":
                out[token, 4] = min(come, 5)
            if frame > 0:
                out[token, 5] = int(actor.at(frame - 1) is None)
                out[token, 1] = 5 if new else way_of(actor) if moved else 0
                if not new:
                    over = frame > actor.moves[1]
                    began = 1 if actor.moves[0] == 0 else 3
                    out[token, 2] = (2 if over else began) if moved else 0
        if frame > 0 and (number := labels.sign[token]) >= 0:
            out[token, 3] = int(clip.signs[number].seen[0] > 0)
            if labels.actor[token] < 0:
                out[token, 5] = int(not clip.signs[number].visible(frame - 1))
    return out


class VideoHintHeads(nn.Module):
    """Linear readings of hidden states, each after its own layer."""

    def __init__(self, width: int, hints: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.hints = hints
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name in hints})
        self.fields = nn.ModuleDict({n: nn.Linear(width, m) for n, (m, _) in hints.items()})

    def forward(
        self, layers: tuple[Tensor, ...], at: tuple[Tensor, Tensor], target: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Sum of the mean cross-entropies of the fields, and the share that is right by field, both
        weighted by the inverse root of how often a value occurs.

        Args:
            layers: hidden states [B, L, width] after every layer, the embeddings first; at: rows
            and columns [n] of the places; target: [n, hints], −100 where nothing is known.
        """
        total, told = layers[0].new_zeros((), dtype=torch.float32), {}
        for i, (name, (_, after)) in enumerate(self.hints.items()):
            known = target[:, i] >= 0
            if not known.any():
                continue
            hidden = layers[after][at[0][known], at[1][known]]
            logits = self.fields[name](self.norms[name](hidden)).float()
            own = target[known, i]
            # what is rare counts for more
            weight = torch.bincount(own, minlength=logits.shape[1]).clamp(min=1).float().rsqrt()
            total = total + F.cross_entropy(logits, own, weight=weight)
            good = (logits.argmax(-1) == own).float()
            told[name] = float((good * weight[own]).sum() / weight[own].sum())
        return total, told
