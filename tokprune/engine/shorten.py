"""The language-model input: the embedded prompt, shortened before its first layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokprune.engine.check import Contracts
from tokprune.engine.contracts import ImageTokens, PromptStage, Selection, SequenceView
from tokprune.engine.images import ImageRecord
from tokprune.engine.prompt_layout import PromptLayout


def native_sequence(
    layout: PromptLayout, position_ids: Tensor, device: torch.device
) -> SequenceView:
    """The untouched prompt as a sequence (padding marked by column −1)."""
    batch, length = layout.segment.shape
    arange = torch.arange(length)
    column = torch.where(layout.valid, arange, torch.full_like(arange, -1))
    after = layout.after
    counts = [[len(c) for c in row] for row in layout.columns]
    both = torch.stack([column, layout.segment, after.long()]).to(device, non_blocking=True)
    position = position_ids.to(device).expand(batch, length)
    return SequenceView(
        column=both[0],
        position=position,
        segment=both[1],
        after=both[2] != 0,
        counts=counts,
        entering=counts,
        text_after=after.sum(1).tolist(),
        lengths=layout.valid.sum(1).tolist(),
        next_position=position.masked_fill(both[0] < 0, -1).amax(1) + 1,
        padded=layout.padded,
    )


def _select(
    images: list[ImageTokens], stages: Sequence[PromptStage], contracts: Contracts
) -> tuple[list[ImageTokens], list[Selection | None]]:
    """Run the prompt stages one after the other on all images of a batch."""
    last: list[Selection | None] = [None] * len(images)
    for stage in stages:
        answers = stage.select(images)
        contracts.selections(stage, answers, images)
        for i, answer in enumerate(answers):
            if answer is not None:
                images[i] = _reduced(images[i], answer)
                last[i] = answer
    return images, last


def _reduced(image: ImageTokens, selection: Selection) -> ImageTokens:
    index = selection.index
    features = image.features[index] if selection.features is None else selection.features
    return replace(
        image,
        features=features,
        tile=image.tile[index],
        row=image.row[index],
        col=image.col[index],
        column=image.column[index],
        newline=image.newline[index],
        patches=index.shape[0],
        score=None if image.score is None else image.score[index],
        tag=None if image.tag is None else image.tag[index],
        raw=None,
    )


def _instruction(embeds: Tensor, layout: PromptLayout, row: int) -> Tensor:
    """Embeddings [m, D] of the text after a prompt's last image, or of all its text."""
    text = layout.after[row]
    if not bool(text.any()):  # host tensors
        text = layout.valid[row] & (layout.segment[row] < 0)
    return embeds[row, text.nonzero().view(-1).to(embeds.device)]


def shorten_prompt(
    embeds: Tensor,
    layout: PromptLayout,
    records: list[ImageRecord],
    stages: Sequence[PromptStage],
    sequence: SequenceView,
    compact: bool,
    contracts: Contracts,
) -> tuple[Tensor, SequenceView, list[ImageTokens], list[Selection | None]]:
    """Apply encoder results and prompt stages to an embedded prompt.

    ``embeds`` [B, L, D] with the model's own packed features in place; ``sequence`` its native
    sequence. Where nothing is dropped, moved or merged, ``embeds`` and ``sequence`` come back
    unchanged (the same objects). Shorter rows are padded on the left.
    """
    batch, length = embeds.shape[:2]
    device = embeds.device
    images: list[ImageTokens] = []
    places: list[tuple[int, int]] = []
    wants_text = any(stage.wants_text for stage in stages)
    for b, row in enumerate(layout.image_of):
        text = _instruction(embeds, layout, b) if wants_text and row else None
        for s, number in enumerate(row):
            columns = layout.columns[b][s].to(device)
            images.append(replace(records[number].tokens(embeds[b, columns], columns), text=text))
            places.append((b, s))
    images, answers = _select(images, stages, contracts)
    untouched = all(a is None for a in answers) and all(
        records[n].features is None for row in layout.image_of for n in row
    )
    if untouched:
        if any(i.tag is not None for i in images):
            sequence.tag = torch.zeros(batch, length, dtype=torch.bool, device=device)
            for (b, s), image in zip(places, images):
                if image.tag is not None:
                    sequence.tag[b, layout.columns[b][s].to(device)] = image.tag
        return embeds, sequence, images, answers

    # rows of the prompt, then those of every image, to gather the new sequence from
    bank = torch.cat([embeds.flatten(0, 1), *[i.features.to(embeds.dtype) for i in images]])
    sources, columns_, counts = [], [], []
    first, ahead = batch * length, iter(images)
    for b, columns_of_row in enumerate(layout.columns):
        source, column, own, cursor = [], [], [], 0
        for at, image in zip(columns_of_row, ahead):
            text = _text(layout, b, cursor, int(at[0])).to(device)
            source += [text + b * length, torch.arange(first, first + image.count, device=device)]
            column += [text, image.column]
            own.append(image.count)
            first, cursor = first + image.count, int(at[-1]) + 1
        text = _text(layout, b, cursor, length).to(device)
        sources.append(torch.cat([*source, text + b * length]))
        columns_.append(torch.cat([*column, text]))
        counts.append(own)
    lengths = [len(s) for s in sources]
    padded = min(lengths) < max(lengths)
    source_, column_ = _left_padded(sources, 0), _left_padded(columns_, -1)
    new = take(sequence, column_, counts, lengths, padded, compact)
    new.entering = counts
    if any(i.tag is not None for i in images):
        tags = [column_.new_zeros(batch * length, dtype=torch.bool)]
        tags += [torch.zeros_like(i.newline) if i.tag is None else i.tag for i in images]
        new.tag = torch.cat(tags)[source_]
    return bank[source_], new, images, answers


def _text(layout: PromptLayout, row: int, start: int, end: int) -> Tensor:
    """Columns of the real tokens of a row between two of its columns (CPU)."""
    return torch.arange(start, end)[layout.valid[row, start:end]]


def _left_padded(rows: list[Tensor], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.stack(
        [torch.nn.functional.pad(row, (longest - len(row), 0), value=value) for row in rows]
    )


def take(
    sequence: SequenceView,
    index: Tensor,
    counts: list[list[int]],
    lengths: list[int],
    padded: bool,
    compact: bool,
) -> SequenceView:
    """A shorter sequence: entries at ``index`` [B, L'] of it (−1 = padding at the left)."""
    gone = index < 0
    place = index.clamp(min=0)
    position = sequence.position.gather(1, place)
    next_position = sequence.next_position
    if compact:
        # renumber from the position of the row's first real token on
        first = gone.sum(1, keepdim=True).clamp(max=index.shape[1] - 1)
        rank = torch.arange(index.shape[1], device=index.device)[None, :] - first
        arange = torch.arange(sequence.column.shape[1], device=index.device)
        begin = torch.where(sequence.valid, arange, sequence.column.shape[1]).amin(1, keepdim=True)
        begin = begin.clamp(max=sequence.column.shape[1] - 1)
        position = (sequence.position.gather(1, begin) + rank).clamp(min=0)
        next_position = position[:, -1] + 1
    return SequenceView(
        column=sequence.column.gather(1, place).masked_fill(gone, -1),
        position=position.masked_fill(gone, 0),
        segment=sequence.segment.gather(1, place).masked_fill(gone, -1),
        after=sequence.after.gather(1, place) & ~gone,
        counts=counts,
        entering=sequence.entering,
        text_after=sequence.text_after,
        lengths=lengths,
        next_position=next_position,
        tag=None if sequence.tag is None else sequence.tag.gather(1, place) & ~gone,
        padded=padded,
    )
