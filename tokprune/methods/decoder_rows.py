"""Rows of the decoder's sequence: the text that asks, what it attends to, the tokens of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokprune.engine.contracts import Attention, SequenceView
from tokprune.operators.sparsevlm import rater_attention, vision_scores


def asking_rows(sequence: SequenceView) -> tuple[Tensor, Tensor]:
    """Places [B, R] of the text behind the last image, and which are real [B, R]; the last token
    stands in where no text follows."""
    rows, real = sequence.text_rows()
    if not min(sequence.text_after):
        rows = torch.cat([rows, sequence.last_row()], dim=1)
        real = torch.cat([real, ~real.any(1, keepdim=True)], dim=1)
    return rows, real


def mean_attention(attention: Attention, rows: Tensor, counted: Tensor) -> Tensor:
    """What the rows [B, R] that are ``counted`` pay to every token, mean over them and over heads:
    [B, L] float32. Of a long text a few rows are made at a time."""
    parts = attention.parts(rows, counted)
    total = sum(rater_attention(attention.rows(part), own) for part, own in parts)
    assert isinstance(total, Tensor)
    return vision_scores(total, counted)


def tokens_of_images(
    sequence: SequenceView, images: Sequence[tuple[int, int]], tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row [I, 1] and places [I, tokens], ascending, of the first ``tokens`` tokens of some images,
    each (row, number of the image in it); host."""
    row, number = torch.tensor(images).T.to(device, non_blocking=True)
    others = (sequence.segment[row] != number[:, None]).to(torch.int8)
    return row[:, None], others.sort(stable=True).indices[:, :tokens]


def place_in_choice(
    sequence: SequenceView, counts: Sequence[Sequence[int]], hidden: Tensor,
    choose: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:  # fmt: skip
    """Of every token [B, L] its place in its image's choice, as a falling score: 0 for those that
    are not chosen, and in images that lose nothing.

    Args:
        sequence: as it is.
        counts: tokens that are to stay, by batch row and image (host).
        hidden: [B, L, D], for its device.
        choose: gives of images with equally many tokens, at rows [I, 1] and places [I, n], the
            ``most`` to be chosen [I, most] in their order, of which a start is the choice of fewer.
    """
    score = torch.zeros(hidden.shape[:2], device=hidden.device)
    alike: dict[int, list[tuple[int, int, int]]] = {}
    for row, (own, now) in enumerate(zip(counts, sequence.counts)):
        for image, (keep, tokens) in enumerate(zip(own, now)):
            if keep < tokens:
                alike.setdefault(tokens, []).append((row, image, keep))
    for tokens, members in alike.items():
        images = [(row, image) for row, image, _ in members]
        rows, place = tokens_of_images(sequence, images, tokens, hidden.device)
        if most := max(keep for _, _, keep in members):
            order = choose(rows, place, most)
            falling = torch.arange(most, 0, -1.0, device=hidden.device)
            score[rows, place.gather(1, order)] = falling.expand(order.shape)
    return score
