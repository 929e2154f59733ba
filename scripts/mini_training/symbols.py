"""The code in which patches speak to the language model: what a patch shows, as a sum of vectors.

Where a word exists, the vector is the embedding of that word, so that a patch can be matched with a
question and be named by the language head; the rest is random. The code is fixed, so both sides
learn it at the same time: the language model reads it (language.py), tower and projector write it
(vision.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mini_training.labels import DISTRACTOR, FIELDS, PLATE, TEXTURE
from mini_training.model import TOKEN
from tokprune.eval.benchmarks.mini.world import CHARACTERS, COLORS, GRID, KINDS, PLATES


class Symbols(nn.Module):
    """Vectors of patches from labels and texture; follows ``tokens`` [vocabulary, width]."""

    def __init__(self, tokens: Tensor, seed: int = 7) -> None:
        super().__init__()
        width = tokens.shape[1]
        generator = torch.Generator().manual_seed(seed)
        word = tokens.detach().float()

        def rows(names: tuple[str, ...]) -> Tensor:
            return word[[TOKEN[name] for name in names]]

        code = {n: torch.randn(m, width, generator=generator) * 0.1 for n, m in FIELDS.items()}
        for name in ("color", "size", "role", "char", "plate", "place"):
            code[name][0] = 0
        code["kind"][1:DISTRACTOR] = rows(KINDS)
        code["kind"][PLATE] = rows(("plate",))
        code["color"][1:] = rows(tuple(COLORS))
        code["plate"][1:] = rows(tuple(PLATES))
        first, later = rows(tuple(CHARACTERS)), rows(tuple(f"##{c}" for c in CHARACTERS))
        code["char"][1:] = (first + later) / 2**0.5
        place = (torch.arange(GRID) + 0.5) / GRID
        for name, low, high in (("row", "top", "bottom"), ("col", "left", "right")):
            waves = [2 * place - 1]
            for f in (0.5, 1.0, 2.0, 4.0):
                waves += [torch.sin(2 * math.pi * f * place), torch.cos(2 * math.pi * f * place)]
            basis = torch.randn(len(waves), width, generator=generator)
            near = torch.where(place[:, None] < 0.5, rows((low,)), rows((high,)))
            code[name] = 0.05 * torch.stack(waves, 1) @ basis + 0.7 * near
        for name, table in code.items():
            self.register_buffer(name, table)
        # says nothing that a question asks for, but keeps one piece of ground unlike the next
        texture = torch.randn(TEXTURE, width, generator=generator) * 0.1 / TEXTURE**0.5
        self.register_buffer("texture", texture)

    def forward(self, label: Tensor, texture: Tensor) -> Tensor:
        """label [..., fields], texture [..., TEXTURE] → [..., width]."""
        total = texture.to(self.texture.dtype) @ self.texture
        for i, name in enumerate(FIELDS):
            total = total + getattr(self, name)[label[..., i]]
        return total
