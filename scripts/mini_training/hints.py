"""Intermediate supervision: what a word of a question should have found in the picture.

"what color is the star ?" needs two steps: find the star, then tell its colour. The answer alone
teaches them only together, which takes the language model very long to discover. So halfway
through the decoder, at the word "star", small heads (thrown away afterwards) must say how many
stars there are and, for a single one, its colour, size and place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_training.labels import FIELDS
from tokprune.eval.benchmarks.mini.scene import Scene, Thing
from tokprune.eval.benchmarks.mini.world import CHARACTERS, COLORS, KINDS, PLATES, SIZES

#: decoder layers below the heads
AFTER = 3
MOST = 5
HINTS = {"count": MOST + 1, **{n: FIELDS[n] for n in ("kind", "color", "size", "row", "col")},
         "char": FIELDS["char"]}  # fmt: skip
_NUMBER = {
    "kind": {k: i + 1 for i, k in enumerate(KINDS)},
    "color": {c: i + 1 for i, c in enumerate(COLORS)} | {"": 0},
    "size": {s: i + 1 for i, s in enumerate(SIZES)},
    "char": {c: i + 1 for i, c in enumerate(CHARACTERS)},
}


def hints_of(scene: Scene, question: str) -> list[tuple[int, dict[str, int]]]:
    """(number of the word, field → value) for every word that refers to something."""
    words = question.split()
    found = []
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        if word in KINDS:
            things = [t for t in scene.things if t.kind == word]
            if before in COLORS:
                things = [t for t in things if t.color == before]
            found.append((i, _about(things)))
        elif word == "plate" and before in PLATES:
            for plate in scene.plates:
                if plate.color == before:
                    first = _NUMBER["char"][plate.text[0]]
                    found.append((i, {"char": first, "row": plate.row, "col": plate.col}))
        elif word in COLORS and words[1] in ("shape", "many"):
            things = [t for t in scene.things if t.color == word]
            found.append((i, _about(things)))
    return found


def _about(things: list[Thing]) -> dict[str, int]:
    told = {"count": min(len(things), MOST)}
    if len(things) == 1:
        (thing,) = things
        told |= {
            "kind": _NUMBER["kind"][thing.kind],
            "color": _NUMBER["color"][thing.color],
            "size": _NUMBER["size"][thing.size],
            "row": int(thing.center[0]),
            "col": int(thing.center[1]),
        }
    return told


class HintHeads(nn.Module):
    """Linear readings of the hidden state at a word."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fields = nn.ModuleDict({name: nn.Linear(width, n) for name, n in HINTS.items()})

    def forward(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, float]:
        """Mean cross-entropy over what is known, and the share that is right.

        Args:
            hidden: [n, width]; target: [n, len(HINTS)], −100 where nothing is known.
        """
        normed = self.norm(hidden)
        total, right, known = hidden.new_zeros((), dtype=torch.float32), 0, 0
        for i, head in enumerate(self.fields.values()):
            logits = head(normed).float()
            total = total + F.cross_entropy(logits, target[:, i], reduction="sum")
            seen = target[:, i] >= 0
            right += int((logits.argmax(-1) == target[:, i])[seen].sum())
            known += int(seen.sum())
        return total / max(len(target), 1), right / max(known, 1)
