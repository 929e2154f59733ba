"""Sequences that golden checks hand to stages."""

from __future__ import annotations

import torch

from tokprune.engine.contracts import SequenceView


def prompt(length: int, start: int, image: int) -> SequenceView:
    """One prompt of ``length`` tokens with an image at ``start``."""
    arange = torch.arange(length)[None]
    inside = (arange >= start) & (arange < start + image)
    return SequenceView(
        column=arange, position=arange, slot=arange, segment=torch.where(inside, 0, -1),
        after=arange >= start + image, counts=[[image]], entering=[[image]],
        text_after=[length - start - image], lengths=[length],
    )  # fmt: skip
