"""Random prompts of any family: a maker says what an image and a video are, the rest is shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass
class Piece:
    """One image or video of a prompt.

    ``ids``: its prompt tokens in order, placeholders and what stands between and around them
    (markers, row breaks, time words); ``types``: a number per id for the family's token types;
    ``inputs``: its own pixel-side inputs; ``row``: batch row, filled in by the maker.
    """

    ids: list[int]
    types: list[int]
    inputs: dict[str, Tensor]
    row: int = field(default=-1)


class PromptMaker:
    """Makes batches of random prompts; subclasses fill in the first four methods."""

    #: name of the input that types every token (0 = text), where the family has one
    types: ClassVar[str | None] = None

    def image(self, model: Any, size: tuple[int, int], generator: torch.Generator) -> Piece:
        """An image of ``size`` (height, width) pixels, random."""
        raise NotImplementedError

    def video(self, model: Any, frames: int, generator: torch.Generator) -> Piece:
        """A random video."""
        raise NotImplementedError(f"{type(self).__name__} makes no videos")

    def collate(self, images: Sequence[Piece], videos: Sequence[Piece]) -> dict[str, Tensor]:
        """Pixel-side inputs of a batch; {} without any."""
        raise NotImplementedError

    def cut(
        self, inputs: dict[str, Tensor], row: int, images: slice, videos: slice
    ) -> dict[str, Tensor]:
        """Pixel-side inputs of batch row ``row`` alone, whose images and videos these are."""
        raise NotImplementedError

    # ------------------------------------------------------------------ for all families

    #: sizes of images where a caller does not care: different grids, in pixels
    sizes: ClassVar[Sequence[tuple[int, int]]] = ((24, 24),)

    def inputs(
        self, model: Any, prompts: list[list[Any]], sizes: list[tuple[int, int]] | None = None,
        seed: int = 1, pad_side: str = "left", frames: int = 4,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Inputs of a batch of random prompts, placeholders and pixels that fit each other.

        Args:
            model: a tiny model.
            prompts: each lists text lengths, ``"image"`` and ``"video"`` entries, for example
                ``[4, "image", 6]``.
            sizes: (height, width) in pixels of every image, for models that care (None: those of
                the maker, in turn).
            seed: of text and pixels.
            pad_side: "left" or "right".
            frames: of every video.

        Returns:
            ``input_ids``, ``attention_mask`` [B, L] long, the family's token types if it has any,
            and its pixel-side inputs.
        """
        generator = torch.Generator().manual_seed(seed)
        images: list[Piece] = []
        videos: list[Piece] = []
        rows: list[tuple[list[int], list[int]]] = []
        for number, prompt in enumerate(prompts):
            ids: list[int] = []
            types: list[int] = []
            for part in prompt:
                if part == "image":
                    wanted = sizes or self.sizes
                    piece = self.image(model, wanted[len(images) % len(wanted)], generator)
                    images.append(piece)
                elif part == "video":
                    piece = self.video(model, frames, generator)
                    videos.append(piece)
                else:
                    text = torch.randint(3, 90, (part,), generator=generator).tolist()
                    piece = Piece(text, [0] * part, {})
                piece.row = number
                ids += piece.ids
                types += piece.types
            rows.append((ids, types))
        longest = max(len(ids) for ids, _ in rows)

        def padded(values: list[int]) -> list[int]:
            gap = [0] * (longest - len(values))
            return gap + values if pad_side == "left" else values + gap

        out = {
            "input_ids": torch.tensor([padded(ids) for ids, _ in rows]),
            "attention_mask": torch.tensor([padded([1] * len(ids)) for ids, _ in rows]),
        }
        if self.types is not None:
            out[self.types] = torch.tensor([padded(types) for _, types in rows])
        if images or videos:
            out.update(self.collate(images, videos))
        return out

    def row(
        self, inputs: dict[str, Tensor], row: int, images: slice, videos: slice = slice(0, 0)
    ) -> dict[str, Tensor]:
        """One row of a batch as a batch of one, padding removed; ``images``, ``videos``: which of
        the batch's are this row's."""
        real = inputs["attention_mask"][row] != 0
        names = ["input_ids", "attention_mask", *([self.types] if self.types else [])]
        out = {name: inputs[name][row : row + 1, real] for name in names}
        if images.start < images.stop or videos.start < videos.stop:
            out.update(self.cut(inputs, row, images, videos))
        return out
