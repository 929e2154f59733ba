"""How the package packs image features into prompts, learned by running its own code on numbers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.engine.contracts import TowerFacts
from tokprune.engine.model import ImageLayout
from tokprune.engine.prompt_layout import PromptLayout
from tokprune.errors import PromptMismatchError

#: the package's placeholder of an image, ``llava.constants.IMAGE_TOKEN_INDEX``
PLACEHOLDER = -200
NEWLINE, TEXT = -1, -2


def is_anyres(config: Any) -> bool:
    """Whether images are cut into tiles."""
    return getattr(config, "image_aspect_ratio", None) == "anyres"


@dataclass
class Packed:
    """Where a batch's images go: ``layouts``, one per image, and ``prompt``, whose ``valid`` says
    which columns the decoder will be told are real."""

    layouts: list[ImageLayout]
    prompt: PromptLayout


class _Numbers:
    """Stands in for the model in its own packing, with numbers for feature vectors: ``tile ·
    rows + row`` for features, −1 for the newline, −2 for text."""

    device = torch.device("cpu")

    def __init__(self, model: Any, rows: int, limit: int | None) -> None:
        self.config = copy.copy(model.config)
        self.config.tokenizer_model_max_length = limit
        self.rows = rows
        tower = model.get_vision_tower()
        self.tower = SimpleNamespace(
            num_patches_per_side=tower.num_patches_per_side, config=tower.config
        )
        self.model = SimpleNamespace(
            image_newline=torch.tensor([NEWLINE]),
            embed_tokens=lambda ids: torch.full((*ids.shape, 1), TEXT),
        )

    def get_vision_tower(self) -> Any:
        return self.tower

    def get_model(self) -> Any:
        return self.model

    def encode_images(self, images: Tensor) -> Tensor:
        return torch.arange(len(images) * self.rows).view(len(images), self.rows, 1)


def pack(
    model: Any, facts: TowerFacts, ids: Tensor, mask: Tensor | None, images: Any, sizes: Any
) -> Packed:
    """How the package packs a batch: its own code, run on numbers instead of features.

    Args:
        ids: [B, L] with −200 where an image goes; mask: [B, L] or None; images: list of [3, H, W]
            or [tiles, 3, H, W], or one tensor [images, (tiles,) 3, H, W]; sizes: (width, height)
            per image in pixels, or None.

    Raises:
        PromptMismatchError: more placeholders than images, or an image is cut off by
            ``config.tokenizer_model_max_length``.
        ValueError: anyres images without ``sizes``.
    """
    listed = isinstance(images, (list, tuple)) or images.ndim == 5
    tiles = [x.shape[0] if x.ndim == 4 else 1 for x in images] if listed else [1] * len(images)
    ids = ids.cpu()
    real = torch.ones_like(ids) if mask is None else mask.cpu()
    _check_counts(ids, real, len(tiles))
    config = model.config
    if sizes is None and max(tiles) > 1 and is_anyres(config):
        raise ValueError(
            "image_sizes is missing: images of several tiles (image_aspect_ratio='anyres') are "
            "packed by their (width, height)"
        )

    def run(limit: int | None) -> tuple[Tensor, Tensor]:
        blank = [torch.empty(*x.shape[:-3], 1, 1, 1) for x in images]
        _, _, kept, _, numbers, _ = type(model).prepare_inputs_labels_for_multimodal(
            _Numbers(model, facts.tokens_per_tile, limit), ids, None, real, None, None,
            blank if listed else torch.stack(blank), image_sizes=sizes,
        )  # fmt: skip
        return numbers[..., 0], kept != 0

    numbers, kept = run(None)
    limit = getattr(config, "tokenizer_model_max_length", None)
    if limit is not None and numbers.shape[1] > limit:
        _check_limit(numbers, kept, limit)
        numbers, kept = run(limit)
    prompt = _prompt(numbers, kept, tiles, facts.tokens_per_tile)
    if mask is None:  # the decoder is not told of padding then
        prompt.valid = torch.ones_like(kept)
    return Packed(_layouts(model, numbers, prompt, tiles, sizes, facts.tokens_per_tile), prompt)


def _check_counts(ids: Tensor, real: Tensor, images: int) -> None:
    per_row = ((ids == PLACEHOLDER) & (real != 0)).sum(1)
    needed = int(per_row.clamp(min=1).sum())  # the package takes an image for rows without one too
    if needed > images:
        raise PromptMismatchError(
            f"input_ids holds {int(per_row.sum())} image placeholder(s) ({PLACEHOLDER}) in "
            f"{len(ids)} row(s), which takes {needed} image(s) (one also for a row without any); "
            f"images holds {images}"
        )


def _check_limit(numbers: Tensor, kept: Tensor, limit: int) -> None:
    for b, (row, own) in enumerate(zip(numbers, kept)):
        places = (row[own] != TEXT).nonzero().view(-1)
        if len(places) and int(places[-1]) >= limit:
            raise PromptMismatchError(
                f"input_ids row {b}: its last image token stands at {int(places[-1])}, but "
                f"config.tokenizer_model_max_length={limit} cuts the prompt there; shorten the "
                "text or raise the limit"
            )


def _prompt(numbers: Tensor, kept: Tensor, tiles: list[int], rows: int) -> PromptLayout:
    """Segments of every row, from the numbers that stand there."""
    of_tile = torch.arange(len(tiles)).repeat_interleave(torch.tensor(tiles))
    image = torch.where(numbers >= 0, of_tile[numbers.clamp(min=0) // rows], numbers)
    image = image.masked_fill(~kept, TEXT)
    # a newline belongs to the image that stands before it
    arange = torch.arange(numbers.shape[1])
    image = image.gather(1, torch.where(image != NEWLINE, arange, 0).cummax(1).values)
    before = nn.functional.pad(image, (1, 0), value=TEXT)[:, :-1]
    starts = (image >= 0) & (image != before)
    segment = torch.where(image >= 0, starts.long().cumsum(1) - 1, -1)
    columns = [
        [(row == s).nonzero().view(-1) for s in range(int(row.max()) + 1)] for row in segment
    ]
    image_of = [[int(image[b, own[0]]) for own in row] for b, row in enumerate(columns)]
    return PromptLayout(columns, image_of, segment, kept)


def _layouts(
    model: Any, numbers: Tensor, prompt: PromptLayout, tiles: list[int], sizes: Any, rows: int
) -> list[ImageLayout]:
    packed = {
        number: numbers[b, columns]
        for b, row in enumerate(prompt.columns)
        for columns, number in zip(row, prompt.image_of[b])
    }
    layouts, first = [], 0
    for i, count in enumerate(tiles):
        own = packed.get(i, torch.empty(0, dtype=torch.long))  # none: an image nobody refers to
        size, grid = None, (0, 0)
        if sizes is not None:
            width, height = (int(v) for v in sizes[i])
            size = (height, width)
            if count > 1 and is_anyres(model.config):
                grid = _tile_grid(model, (width, height))
        own = torch.where(own >= 0, own - first * rows, own)
        layouts.append(ImageLayout(own, count, size, grid))
        first += count
    return layouts


def _tile_grid(model: Any, size: Sequence[int]) -> tuple[int, int]:
    """Tiles (down, across) of an image of this (width, height)."""
    from llava.mm_utils import get_anyres_image_grid_shape

    side = model.get_vision_tower().config.image_size
    across, down = get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, side)
    return down, across
