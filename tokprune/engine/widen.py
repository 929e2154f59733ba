"""Images that come to have more tokens than they had in the prompt.

Methods that reduce tiles inside the tower may keep class tokens and cells of padding, which the
model itself does not pack. The prompt then gets columns for them, which only this prefill sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokprune.engine.images import ImageRecord
from tokprune.engine.prompt_layout import PromptLayout


def widened(layout: PromptLayout, records: list[ImageRecord]) -> tuple[PromptLayout, Tensor] | None:
    """A prompt with room for all tokens of its images, and the column [B, L'] (CPU) of the prompt
    that each of its columns comes from, −1 = padding; None where there is room. Columns are added
    behind the image that needs them."""
    batch, length = layout.segment.shape
    rows: list[list[int]] = []
    for b in range(batch):
        own_columns = list(range(length))
        for own, number in zip(reversed(layout.columns[b]), reversed(layout.image_of[b])):
            features = records[number].features
            more = 0 if features is None else max(0, features.shape[0] - len(own))
            last = int(own[-1])
            own_columns[last + 1 : last + 1] = [last] * more
        rows.append(own_columns)
    longest = max(map(len, rows))
    if longest == length:
        return None
    source = torch.tensor([[-1] * (longest - len(row)) + row for row in rows])
    place = source.clamp(min=0)
    segment = layout.segment.gather(1, place).masked_fill(source < 0, -1)
    valid = layout.valid.gather(1, place) & (source >= 0)
    columns = [
        [(segment[b] == s).nonzero().view(-1) for s in range(len(own))]
        for b, own in enumerate(layout.columns)
    ]
    return PromptLayout(columns, layout.image_of, segment, valid), source


def widen_arguments(
    kwargs: dict[str, Any], source: Tensor, valid: Tensor, past: int, before: Tensor | None = None
) -> Tensor:
    """Make the language model's arguments those of the wider prompt; returns its real tokens
    [B, past + L']. ``valid`` [B, L'] (CPU): those of the prompt; ``before`` [B, past + L]: of the
    user's, where the mask is of another form (a prefix that sees in both directions): columns that
    are added then see, and are seen, as the last token of their image."""
    embeds = kwargs["inputs_embeds"]
    device, (batch, length) = embeds.device, embeds.shape[:2]
    place = source.clamp(min=0).to(device)
    index = place[:, :, None].expand(-1, -1, embeds.shape[2])
    kwargs["inputs_embeds"] = embeds.gather(1, index)
    ids = kwargs.get("position_ids")
    if ids is None:
        ids = torch.arange(past, past + length, device=device)[None]
    kwargs["position_ids"] = ids.expand(batch, -1).gather(1, place)
    mask, real = kwargs.get("attention_mask"), valid.to(device)
    flat = isinstance(mask, Tensor) and mask.dim() == 2
    earlier = mask if flat else before
    cached = real.new_ones(batch, past) if earlier is None else earlier[:, :past] != 0
    whole = torch.cat([cached.to(device), real], dim=1).long()
    if mask is None or flat:
        kwargs["attention_mask"] = whole
    elif isinstance(mask, dict):
        kwargs["attention_mask"] = {
            kind: None if own is None else _wider_mask(own, place, real, past)
            for kind, own in mask.items()
        }
    else:
        kwargs["attention_mask"] = _wider_mask(mask, place, real, past)
    if kwargs.get("cache_position") is not None:  # up to transformers 5.3
        end = past + source.shape[1]
        kwargs["cache_position"] = torch.arange(past, end, device=device)
    return whole


def _wider_mask(mask: Tensor, place: Tensor, real: Tensor, past: int) -> Tensor:
    """A mask [.., 1, L, past + L] (bool or additive) with the rows and columns ``place`` [B, L'];
    columns beyond the prompt's (a cache's room) are hidden."""
    batch, length = place.shape
    columns = mask.shape[3] - mask.shape[2] - past
    mask = mask.expand(batch, -1, -1, -1)
    mask = mask.gather(2, place[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    index = place[:, None, None, :].expand(-1, mask.shape[1], length, -1)
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    new = mask[..., past:].gather(3, index).masked_fill(~real[:, None, None, :], hidden)
    rest = max(0, mask.shape[3] - past - length) if columns else 0
    return torch.cat([mask[..., :past], new, mask.new_full((*new.shape[:3], rest), hidden)], dim=3)
