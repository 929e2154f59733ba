"""The language-model input: what is left of the images of an embedded prompt.

Nothing is shortened here. The tokens that stay are marked, merged ones and those that move are put
into columns of their image, and the drop before decoder layer 0 takes them from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tokprune.engine.check import Contracts
from tokprune.engine.contracts import (
    ImageTokens,
    PromptStage,
    Rectify,
    Selection,
    SequenceView,
)
from tokprune.engine.images import ImageRecord
from tokprune.engine.model import Deep
from tokprune.engine.prompt_layout import PromptLayout
from tokprune.engine.stands_for import at_input
from tokprune.errors import ContractError


@dataclass(frozen=True)
class Merged:
    """Merged tokens of one image: flat places ``slots`` [k] of a batch [B · L] that take ``group``
    and ``weight`` [n] of the tokens at ``sources`` [n] (see :class:`Selection`)."""

    slots: Tensor
    sources: Tensor
    group: Tensor
    weight: Tensor | None


@dataclass(frozen=True)
class InputDrop:
    """What is left of a prompt [B, L] before its first decoder layer: ``mask`` [B, L] True where a
    visual token stays, ``column`` [B, L] the one that stands there now; ``counts`` by row and
    image (host); ``ordered``: no token has moved (host)."""

    mask: Tensor
    column: Tensor
    counts: list[list[int]]
    compact: bool
    ordered: bool
    merged: list[Merged] = field(default_factory=list)


@dataclass
class PromptSelection:
    """The embedded prompt [B, L, D], as it was where nothing has moved; what goes of it (None:
    nothing); marks, and tokens that each stands for, [B, L] or None; what enters the decoder of
    every image, and the answers, both without features."""

    embeds: Tensor
    drop: InputDrop | None
    tag: Tensor | None
    size: Tensor | None
    images: list[ImageTokens]
    answers: list[Selection | None]


def native_sequence(
    layout: PromptLayout, device: torch.device, width: int | None = None
) -> SequenceView:
    """The untouched prompt as a sequence (padding marked by column −1); its positions are filled
    in when the model has made them. ``width``: columns of the user's prompt, where it is another
    one."""
    length = layout.segment.shape[1]
    arange = torch.arange(length)
    column = torch.where(layout.valid, arange, torch.full_like(arange, -1))
    after = layout.after
    counts = [[len(c) for c in row] for row in layout.columns]
    both = torch.stack([column, layout.segment, after.long()]).to(device, non_blocking=True)
    return SequenceView(
        column=both[0],
        position=both[0],
        segment=both[1],
        after=both[2] != 0,
        counts=counts,
        entering=counts,
        text_after=after.sum(1).tolist(),
        lengths=layout.valid.sum(1).tolist(),
        slot=both[0],
        padded=layout.padded,
        width=length if width is None else width,
        wider=width is not None and width != length,
    )


def run_stages(
    images: list[ImageTokens],
    last_of_prompt: list[bool],
    stages: Sequence[PromptStage],
    contracts: Contracts,
    rectify: Rectify | None,
) -> tuple[list[ImageTokens], list[Selection | None]]:
    """Run the prompt stages one after the other on all images of a batch; ``last_of_prompt``: of
    every image whether it ends its prompt."""
    last: list[Selection | None] = [None] * len(images)
    for stage in stages:
        answers = stage.select(images)
        contracts.selections(stage, answers, images)
        for i, answer in enumerate(answers):
            if answer is not None:
                if last_of_prompt[i] and answer.features is None:
                    answer = _with_last(answer, images[i])
                whole, images[i] = images[i], _reduced(images[i], answer)
                if rectify is not None:
                    images[i].stands_for = at_input(rectify, whole, answer)
                last[i] = answer
    return images, last


def _with_last(answer: Selection, image: ImageTokens) -> Selection:
    """The image ends its prompt, where the answer is read: its last token takes the place of the
    survivor that stands last, and comes last of all."""
    end = image.column.argmax()
    if not answer.index.shape[0]:
        return replace(answer, index=end[None])
    latest = image.column[answer.index].argmax()
    arange = torch.arange(answer.index.shape[0], device=end.device)
    index = torch.where(arange == latest, end, answer.index)
    return replace(answer, index=index[(index == end).to(torch.int8).sort(stable=True).indices])


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
        metric=None if image.metric is None else image.metric[index],
        stands_for=None,
        raw=None,
    )


def _instruction(embeds: Tensor, layout: PromptLayout, row: int) -> Tensor:
    """Embeddings [m, D] of the text after a prompt's last image, or of all its text."""
    text = layout.after[row]
    if not bool(text.any()):  # host tensors
        text = layout.valid[row] & (layout.segment[row] < 0)
    return embeds[row, text.nonzero().view(-1).to(embeds.device)]


def _slots(own: Tensor, column: Tensor) -> Tensor:
    """Different columns [k], ascending, of an image at ``own`` [n] for tokens that stand at
    ``column`` [k], in any order and some of them together: their own where these ascend."""
    k = column.shape[0]
    arange = torch.arange(k, device=own.device)
    rank = torch.searchsorted(own, column.sort().values)
    rank = (rank - arange).cummax(0).values + arange
    return own[rank.minimum(own.shape[0] - k + arange)]


def select_visual(
    embeds: Tensor,
    layout: PromptLayout,
    records: list[ImageRecord],
    stages: Sequence[PromptStage],
    compact: bool,
    contracts: Contracts,
    rectify: Rectify | None = None,
) -> PromptSelection:
    """Apply encoder results and prompt stages to an embedded prompt ``embeds`` [B, L, D] that holds
    the model's own packed features."""
    batch, length = embeds.shape[:2]
    device = embeds.device
    images: list[ImageTokens] = []
    places: list[tuple[int, Tensor]] = []
    ends: list[bool] = []
    wants_text = any(stage.wants_text for stage in stages)
    for b, row in enumerate(layout.image_of):
        text = _instruction(embeds, layout, b) if wants_text and row else None
        silent = bool(row) and not bool(layout.after[b].any())
        for s, number in enumerate(row):
            record, columns = records[number], layout.columns[b][s].to(device)
            packed = columns[: record.count]  # without those of a wider prompt
            images.append(replace(record.tokens(embeds[b, packed], packed), text=text))
            places.append((b, columns))
            ends.append(silent and s + 1 == len(row))
    originals = [image.column for image in images]
    numbers = [number for row in layout.image_of for number in row]
    images, answers = run_stages(images, ends, stages, contracts, rectify)

    column = torch.arange(length, device=device).repeat(batch, 1)
    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    tag = None
    if any(image.tag is not None for image in images):
        tag = torch.zeros(batch, length, dtype=torch.bool, device=device)
    size = None
    if any(image.stands_for is not None for image in images):
        size = torch.ones(batch, length, device=device)
    moved: list[tuple[Tensor, Tensor]] = []
    merged: list[Merged] = []
    changed, ordered = False, True
    for i, ((b, own), image, answer) in enumerate(zip(places, images, answers)):
        reduced = records[numbers[i]].features is not None
        slots = own
        if answer is not None or reduced:
            changed = True
            if image.count > len(own):
                raise ContractError(
                    f"{contracts.method} makes {image.count} tokens of an image that has "
                    f"{len(own)} in the prompt; it should be at most as many"
                )
            if answer is not None and answer.in_order and not reduced:
                slots = image.column
            else:
                slots = _slots(own, image.column)
                moved.append((slots + b * length, image.features))
                column[b, slots] = image.column
                ordered = False
            mask[b, own] = False
            mask[b, slots] = True
            if answer is not None and answer.features is not None and answer.group is not None:
                before = originals[i]
                merged.append(
                    Merged(slots + b * length, before + b * length, answer.group, answer.weight)
                )
        if tag is not None and image.tag is not None:
            tag[b, slots] = image.tag
        if size is not None and image.stands_for is not None:
            size[b, slots] = image.stands_for
    if not changed:
        return PromptSelection(embeds, None, tag, None, *_numbers(images, answers))
    if moved:
        flat = embeds.flatten(0, 1).clone()
        flat[torch.cat([at for at, _ in moved])] = torch.cat([x for _, x in moved]).to(flat.dtype)
        embeds = flat.view_as(embeds)
    counts: list[list[int]] = [[] for _ in range(batch)]
    for (b, _), image in zip(places, images):
        counts[b].append(image.count)
    drop = InputDrop(mask, column, counts, compact, ordered, merged)
    return PromptSelection(embeds, drop, tag, size, *_numbers(images, answers))


def _numbers(
    images: list[ImageTokens], answers: list[Selection | None]
) -> tuple[list[ImageTokens], list[Selection | None]]:
    """Both without the tensors that hold features, which nobody needs any more: they would take
    their room through the whole decoder."""
    bare = [
        replace(
            image, features=image.features.new_empty(image.count, 0), text=None, raw=None,
            newline_feature=None,
        )
        for image in images
    ]  # fmt: skip
    return bare, [None if own is None else replace(own, features=None) for own in answers]


def merge_deep(deep: Deep, drop: InputDrop) -> Deep:
    """What becomes of the features of the tokens of a prompt that the model adds further down: they
    move and merge with them."""
    if drop.ordered:
        return deep
    device, values = deep.row.device, deep.values
    row = deep.row.gather(1, drop.column.to(device)).flatten()
    parts, count = [values], values.shape[0]
    for own in drop.merged:
        k = own.slots.shape[0]
        source = deep.row.flatten()[own.sources.to(device)]
        rows = values[source.clamp(min=0)].float().masked_fill((source < 0)[:, None], 0)
        parts.append(merged_rows(rows, own.group, own.weight, k).to(values.dtype))
        row[own.slots.to(device)] = torch.arange(count, count + k, device=device)
        count += k
    values = torch.cat(parts) if drop.merged else values
    return replace(deep, values=values, row=row.view_as(deep.row))


def merged_rows(rows: Tensor, group: Tensor, weight: Tensor | None, k: int) -> Tensor:
    """Float rows [n, D] of an image's tokens as those of the ``k`` that they merge to, by ``group``
    and ``weight`` [n] of a :class:`Selection`: [k, D]."""
    group = torch.where(group < 0, k, group)
    if weight is None:
        members = torch.zeros(k + 1, device=group.device)
        members = members.index_add(0, group, torch.ones_like(group, dtype=members.dtype))
        weight = 1 / members[group]
    total = torch.zeros(k + 1, rows.shape[1], device=rows.device)
    return total.index_add(0, group.to(rows.device), rows * weight.to(rows.device)[:, None])[:-1]
