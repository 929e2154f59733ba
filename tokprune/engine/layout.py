"""Where the images of a batch stand in its prompts: the one host read of a prefill."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.errors import PromptMismatchError


@dataclass
class PromptLayout:
    """Placement of images in a batch of prompts, read once per prefill.

    ``columns[b][s]``: prompt columns [n] (CPU) of image ``s`` of batch row ``b``;
    ``image_of[b][s]``: its number in ``pixel_values``; ``segment`` [B, L] (CPU): image number
    inside the row or −1; ``valid`` [B, L] bool (CPU): real tokens.
    """

    columns: list[list[Tensor]]
    image_of: list[list[int]]
    segment: Tensor
    valid: Tensor

    @property
    def after(self) -> Tensor:
        """[B, L] bool (CPU): real text after the last visual token of its row."""
        length = self.segment.shape[1]
        arange = torch.arange(length)
        last = torch.where(self.segment >= 0, arange, torch.full_like(arange, -1)).amax(1)
        text = (arange[None, :] > last[:, None]) & self.valid
        return text & (last >= 0)[:, None]

    @property
    def padded(self) -> bool:
        return not bool(self.valid.all())

    def repeated(self, times: int) -> PromptLayout:
        """Every row ``times`` times in a row, with the same images (samples, beams)."""
        if times == 1:
            return self
        return PromptLayout(
            [row for row in self.columns for _ in range(times)],
            [row for row in self.image_of for _ in range(times)],
            self.segment.repeat_interleave(times, 0),
            self.valid.repeat_interleave(times, 0),
        )


def read_layout(
    visual: Tensor, attention_mask: Tensor | None, past: int, token_counts: list[int]
) -> PromptLayout:
    """Assign the placeholders of a batch, in reading order, to its images.

    Args:
        visual: [B, L] bool, True at image placeholders.
        attention_mask: [B, past + L] or None (no padding).
        past: number of tokens already cached.
        token_counts: prompt tokens of each image, in the order of ``pixel_values``.

    Raises:
        PromptMismatchError: the number of placeholders is not the number of image tokens, or an
            image would be split between two prompts.
    """
    valid = torch.ones_like(visual) if attention_mask is None else attention_mask[:, past:] != 0
    both = torch.stack([visual, valid]).cpu()  # the host synchronisation of a prefill
    visual, valid = both[0], both[1]
    found = int(visual.sum())
    if found != sum(token_counts):
        raise PromptMismatchError(
            f"input_ids holds {found} image placeholder tokens, but the {len(token_counts)} "
            f"image(s) of pixel_values need {sum(token_counts)} ({token_counts}); build the "
            "prompt and the pixels with the model's own processor, in one call"
        )
    if bool((visual & ~valid).any()):
        raise PromptMismatchError(
            "attention_mask hides image placeholder tokens; it should be 1 on every image token"
        )
    segment = torch.full(visual.shape, -1)
    columns: list[list[Tensor]] = []
    image_of: list[list[int]] = []
    image = 0
    for b in range(visual.shape[0]):
        places = visual[b].nonzero().view(-1)
        columns.append([])
        image_of.append([])
        start = 0
        while start < len(places):
            n = token_counts[image]
            if start + n > len(places):
                raise PromptMismatchError(
                    f"input_ids row {b} holds {len(places)} image placeholder tokens, which does "
                    f"not end at an image boundary (image {image} needs {n} tokens)"
                )
            own = places[start : start + n]
            if int(own[-1] - own[0]) + 1 != n:
                raise PromptMismatchError(
                    f"input_ids row {b}: the {n} placeholder tokens of image {image} are not "
                    "contiguous; text stands between them"
                )
            segment[b, own] = len(columns[b])
            columns[b].append(own)
            image_of[b].append(image)
            start += n
            image += 1
    return PromptLayout(columns, image_of, segment, valid)


def layout_from_mask(visual: Tensor, attention_mask: Tensor | None, past: int) -> PromptLayout:
    """Layout of a prompt whose visual positions the caller names: every run of True of a row is
    one image. [B, L] bool."""
    valid = torch.ones_like(visual) if attention_mask is None else attention_mask[:, past:] != 0
    visual, valid = visual.cpu(), valid.cpu()
    start = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    segment = torch.where(visual, start.long().cumsum(1) - 1, -1)
    columns = [
        [(row == s).nonzero().view(-1) for s in range(int(row.max()) + 1)] for row in segment
    ]
    image_of, image = [], 0
    for row in columns:
        image_of.append(list(range(image, image + len(row))))
        image += len(row)
    return PromptLayout(columns, image_of, segment, valid)
