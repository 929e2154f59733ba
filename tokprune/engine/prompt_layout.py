"""Where images and videos of a batch stand in its prompts: the one host read of a prefill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.errors import PromptMismatchError


@dataclass
class PromptLayout:
    """Placement of images in a batch of prompts, read once per prefill.

    ``columns[b][s]``: prompt columns [n] (CPU) of image ``s`` of batch row ``b``;
    ``image_of[b][s]``: its number among the records of the batch: images in the order of
    ``pixel_values``, then videos; ``segment`` [B, L] (CPU): image number inside the row or −1;
    ``valid`` [B, L] bool (CPU): real tokens.
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

    def split(self, parts: Sequence[Sequence[int]]) -> PromptLayout:
        """The same with some images in several parts, each counted as an image from then on;
        ``parts[i]``: tokens of the parts of image ``i``, in order."""
        if all(len(own) == 1 for own in parts):
            return self
        first = [0]
        for own in parts:
            first.append(first[-1] + len(own))
        segment = torch.full_like(self.segment, -1)
        columns: list[list[Tensor]] = []
        image_of: list[list[int]] = []
        for b, (row, numbers) in enumerate(zip(self.columns, self.image_of)):
            columns.append([])
            image_of.append([])
            for at, image in zip(row, numbers):
                for number, own_columns in enumerate(at.split(list(parts[image]))):
                    segment[b, own_columns] = len(columns[b])
                    columns[b].append(own_columns)
                    image_of[b].append(first[image] + number)
        return PromptLayout(columns, image_of, segment, self.valid)

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


#: what placeholders stand for, and where their pixels are passed
_KINDS = (("image", "pixel_values"), ("video", "pixel_values_videos"))


def read_layout(
    visual: Tensor,
    attention_mask: Tensor | None,
    past: int,
    image_tokens: Sequence[int],
    video_tokens: Sequence[int] = (),
    times: int = 1,
) -> PromptLayout:
    """Assign the placeholders of a batch, in reading order, to its images and videos.

    Args:
        visual: [B, L] bool, True at image placeholders; or long, 1 at those of images and 2 at
            those of videos.
        attention_mask: [B, past + L] or None (no padding).
        past: number of tokens already cached.
        image_tokens: prompt tokens of each image, in the order of ``pixel_values``.
        video_tokens: the same of videos.
        times: how often each prompt of a batch with videos is there in a row (samples, beams):
            all copies show the same videos.

    Raises:
        PromptMismatchError: the number of placeholders is not the number of image tokens, or an
            image would be split between two prompts.
    """
    valid = torch.ones_like(visual) if attention_mask is None else attention_mask[:, past:] != 0
    # the host synchronisation of a prefill
    both = torch.stack([visual.to(torch.int8), valid.to(torch.int8)]).cpu()
    kind, valid = both[0], both[1] != 0
    tokens = (image_tokens, video_tokens)
    for number, ((name, pixels), counts) in enumerate(zip(_KINDS, tokens)):
        copies = times if number else 1
        found, need = int((kind == number + 1).sum()), copies * sum(counts)
        if found != need:
            raise PromptMismatchError(
                f"input_ids holds {found} {name} placeholder tokens, but the {len(counts)} "
                f"{name}(s) of {pixels} need {need} ({list(counts)}"
                + (f", {copies} copies" if copies > 1 else "")
                + "); build the prompt and the pixels with the model's own processor, in one call"
            )
    if bool(((kind > 0) & ~valid).any()):
        raise PromptMismatchError(
            "attention_mask hides image placeholder tokens; it should be 1 on every image token"
        )
    segment = torch.full(kind.shape, -1)
    columns: list[list[Tensor]] = []
    image_of: list[list[int]] = []
    following, begun = [0, 0], 0  # next image and video; first video of this prompt's copies
    for b in range(kind.shape[0]):
        if b % times:
            following[1] = begun
        begun = following[1]
        found_here: list[tuple[Tensor, int]] = []
        for number, counts in enumerate(tokens):
            places = (kind[b] == number + 1).nonzero().view(-1)
            for own, image in _assign(places, counts, following[number], b, _KINDS[number][0]):
                found_here.append((own, image + number * len(image_tokens)))
                following[number] = image + 1
        found_here.sort(key=lambda item: int(item[0][0]))
        columns.append([own for own, _ in found_here])
        image_of.append([image for _, image in found_here])
        for s, own in enumerate(columns[b]):
            segment[b, own] = s
    return PromptLayout(columns, image_of, segment, valid)


def _assign(
    places: Tensor, counts: Sequence[int], image: int, row: int, name: str
) -> Iterator[tuple[Tensor, int]]:
    """Columns and number of every image (or video) of one prompt; ``image``: that of the first."""
    start = 0
    while start < len(places):
        n = counts[image]
        if start + n > len(places):
            raise PromptMismatchError(
                f"input_ids row {row} holds {len(places)} {name} placeholder tokens, which does "
                f"not end at the boundary of one ({name} {image} needs {n} tokens)"
            )
        own = places[start : start + n]
        if int(own[-1] - own[0]) + 1 != n:
            raise PromptMismatchError(
                f"input_ids row {row}: the {n} placeholder tokens of {name} {image} are not "
                "contiguous; text stands between them"
            )
        yield own, image
        start += n
        image += 1


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
