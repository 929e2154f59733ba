"""Where images and videos of a batch stand in its prompts: the one host read of a prefill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.errors import PromptMismatchError

if TYPE_CHECKING:
    from tokprune.engine.model import Tiles


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
    #: the last tokens of every row, which are no part of its prompt (assisted generation)
    guesses: int = 0

    @property
    def after(self) -> Tensor:
        """[B, L] bool (CPU): real text after the last visual token of its row."""
        length = self.segment.shape[1]
        arange = torch.arange(length)
        last = torch.where(self.segment >= 0, arange, torch.full_like(arange, -1)).amax(1)
        text = (arange[None, :] > last[:, None]) & self.valid
        text[:, length - self.guesses :] = False
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
        return replace(self, columns=columns, image_of=image_of, segment=segment)

    def repeated(self, times: int) -> PromptLayout:
        """Every row ``times`` times in a row, with the same images (samples, beams)."""
        if times == 1:
            return self
        return replace(
            self,
            columns=[row for row in self.columns for _ in range(times)],
            image_of=[row for row in self.image_of for _ in range(times)],
            segment=self.segment.repeat_interleave(times, 0),
            valid=self.valid.repeat_interleave(times, 0),
        )

    @property
    def text_behind(self) -> int:
        """Tokens at the end of every row that are text in all rows, guesses among them."""
        behind = self.valid & (self.segment < 0)
        return int(behind.flip(1).int().cummin(1).values.sum(1).min())


#: what placeholders stand for, and where their pixels are passed
_KINDS = (("image", "pixel_values"), ("video", "pixel_values_videos"))


def read_layout(
    visual: Tensor,
    attention_mask: Tensor | None,
    past: int,
    image_tokens: Sequence[int],
    video_tokens: Sequence[int] = (),
    times: int = 1,
    broken: tuple[bool, bool] = (False, False),
) -> PromptLayout:
    """Assign the placeholders of a batch, in reading order, to its images and videos.

    Args:
        visual: [B, L] bool, True at image placeholders; or long, 1 at those of images and 2 at
            those of videos.
        attention_mask: [B, past + L] or None (no padding).
        past: number of tokens already cached.
        image_tokens: prompt tokens of each image, in the order of ``pixel_values``.
        video_tokens: the same of videos.
        times: how often each prompt is there in a row (samples, beams): all copies show the same
            images and videos.
        broken: whether text may stand between the tokens of an image, and of a video.

    Raises:
        PromptMismatchError: the number of placeholders is not the number of image tokens, or an
            image would be split between two prompts.
    """
    kind, valid = _on_host(visual, attention_mask, past)
    tokens = (image_tokens, video_tokens)
    for number, ((name, pixels), counts) in enumerate(zip(_KINDS, tokens)):
        found, need = int((kind == number + 1).sum()), times * sum(counts)
        if found != need:
            raise PromptMismatchError(
                f"input_ids holds {found} {name} placeholder tokens, but the {len(counts)} "
                f"{name}(s) of {pixels} need {need} ({list(counts)}"
                + (f", {times} copies" if times > 1 else "")
                + "); build the prompt and the pixels with the model's own processor, in one call"
            )
    if bool(((kind > 0) & ~valid).any()):
        raise PromptMismatchError(
            "attention_mask hides image placeholder tokens; it should be 1 on every image token"
        )
    segment = torch.full(kind.shape, -1)
    columns: list[list[Tensor]] = []
    image_of: list[list[int]] = []
    following, begun = [0, 0], [0, 0]  # next image and video; first of this prompt's copies
    for b in range(kind.shape[0]):
        if b % times:
            following = list(begun)
        begun = list(following)
        found_here: list[tuple[Tensor, int]] = []
        for number, counts in enumerate(tokens):
            places = (kind[b] == number + 1).nonzero().view(-1)
            name = _KINDS[number][0]
            assigned = _assign(places, counts, following[number], b, name, broken[number])
            for own, image in assigned:
                found_here.append((own, image + number * len(image_tokens)))
                following[number] = image + 1
        found_here.sort(key=lambda item: int(item[0][0]))
        columns.append([own for own, _ in found_here])
        image_of.append([image for _, image in found_here])
        for s, own in enumerate(columns[b]):
            segment[b, own] = s
    return PromptLayout(columns, image_of, segment, valid)


def read_islands(
    visual: Tensor, attention_mask: Tensor | None, past: int, tiles: Tiles, times: int = 1
) -> tuple[PromptLayout, list[int]]:
    """Every run of placeholders [B, L] as an image, where the model knows of its images the tiles
    alone; and the tiles of every image. ``times``: as for :func:`read_layout`.

    Raises:
        PromptMismatchError: a run holds no whole number of tiles, or there are more or fewer than
            the pixels have.
    """
    kind, valid = _on_host(visual, attention_mask, past)
    layout = layout_from_mask(kind > 0, None, 0)
    layout = PromptLayout(layout.columns, [], layout.segment, valid)
    found = int((kind > 0).sum())
    if tiles.count is not None and found != times * tiles.count * tiles.per_tile:
        raise PromptMismatchError(
            f"input_ids holds {found} image placeholder tokens, but the {tiles.count} tile(s) of "
            f"pixel_values need {times * tiles.count * tiles.per_tile} ({tiles.per_tile} each); "
            "build the prompt and the pixels with the model's own processor, in one call"
        )
    if bool(((kind > 0) & ~valid).any()):
        raise PromptMismatchError(
            "attention_mask hides image placeholder tokens; it should be 1 on every image token"
        )
    counts: list[int] = []
    for b, row in enumerate(layout.columns):
        if b % times:
            layout.image_of.append(layout.image_of[-1])
            continue
        layout.image_of.append(list(range(len(counts), len(counts) + len(row))))
        for own in row:
            number, rest = divmod(len(own), tiles.per_tile)
            if rest:
                raise PromptMismatchError(
                    f"input_ids row {b} holds a run of {len(own)} image placeholder tokens, which "
                    f"is no whole number of tiles of {tiles.per_tile}"
                )
            counts.append(number)
    return layout, counts


def _on_host(visual: Tensor, attention_mask: Tensor | None, past: int) -> tuple[Tensor, Tensor]:
    """Kinds of placeholders (0 none) and real tokens [B, L]: the one host synchronisation of a
    prefill."""
    valid = torch.ones_like(visual) if attention_mask is None else attention_mask[:, past:] != 0
    both = torch.stack([visual.to(torch.int8), valid.to(torch.int8)]).cpu()
    return both[0], both[1] != 0


def _assign(
    places: Tensor, counts: Sequence[int], image: int, row: int, name: str, broken: bool
) -> Iterator[tuple[Tensor, int]]:
    """Columns and number of every image (or video) of one prompt; ``image``: that of the first."""
    start = 0
    while start < len(places):
        n = counts[image] if image < len(counts) else len(places) + 1
        if start + n > len(places):
            raise PromptMismatchError(
                f"input_ids row {row} holds {len(places)} {name} placeholder tokens, which does "
                f"not end at the boundary of one ({name} {image} needs {n} tokens)"
            )
        own = places[start : start + n]
        if not broken and int(own[-1] - own[0]) + 1 != n:
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
