"""What stages at the language-model input get and give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.engine.contracts.vision import Positions
from tokprune.operators.anyres import tile_windows


@dataclass
class ImageTokens:
    """Visual tokens of one image at the language-model input, in prompt order.

    ``features`` [n, D] after the projector; ``tile``, ``row``, ``col`` [n] long: tile number
    (0 = base) and cell on that tile's grid, −1 for newline tokens and for the class token;
    ``column`` [n]: prompt column; ``newline`` [n] bool; ``patches``: how many are no newline
    (host); ``score``, ``tag`` [n], ``metric`` [n, d]: what an encoder run left, or None;
    ``tiles``, ``grid``: host;
    ``raw`` [tiles, N, D]: projector output before packing, or None if the encoder was reduced;
    ``newline_feature`` [D] or None; ``text`` [m, D]: embeddings of its prompt's text after the
    last image (of all its text where none follows), only for stages with ``wants_text``.
    """

    features: Tensor
    tile: Tensor
    row: Tensor
    col: Tensor
    column: Tensor
    newline: Tensor
    patches: int
    tiles: int
    grid: tuple[int, int]
    #: the untouched token count of this image in the prompt (host)
    original: int
    score: Tensor | None = None
    tag: Tensor | None = None
    metric: Tensor | None = None
    #: [n] float32, tokens that each stands for, where attention is rectified and some were dropped
    #: or merged before; else None
    stands_for: Tensor | None = None
    raw: Tensor | None = None
    newline_feature: Tensor | None = None
    #: (height, width) of the image in pixels, where the family knows it (host)
    size: tuple[int, int] | None = None
    #: tiles across and down the stitched image (host), base excluded; (0, 0) without tiling
    tile_grid: tuple[int, int] = (0, 0)
    #: frames of a video, or of the part of it that is compressed as one (host): its tiles, so
    #: that ``tile`` is a token's frame; 1 for a still
    frames: int = 1
    text: Tensor | None = None
    video: bool = False
    #: grid of each tile (host) where they differ: an image whose stitched crops the model shrinks
    #: has two "tiles", the base and the shrunk map
    grids: tuple[tuple[int, int], ...] | None = None

    @property
    def count(self) -> int:
        return self.features.shape[0]

    def tile_grids(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every tile's grid; host."""
        return (self.grid,) * self.tiles if self.grids is None else self.grids

    def windows(self) -> list[tuple[int, int, int, int]]:
        """Of every tile the cells that show the image and no padding: (top, bottom, left,
        right), half open; host."""
        if self.video or self.grids is not None or self.tile_grid == (0, 0):
            return [(0, height, 0, width) for height, width in self.tile_grids()]
        return tile_windows(self.grid, self.tile_grid, self.size)

    def patch_rows(self) -> Tensor:
        """Rows that are no newline tokens, [patches], in order."""
        if self.patches == self.count:
            return torch.arange(self.count, device=self.features.device)
        return self.newline.to(torch.int8).sort(stable=True).indices[: self.patches]


@dataclass
class Selection:
    """Answer of a prompt stage for one image: ``index`` [k] rows to keep, in the order in which
    they enter the prompt; for merges ``features`` [k, D] replaces their vectors and ``group``
    [n] names the output row that holds each input row (−1 = dropped), and ``weight`` [n] with how
    much of its vector (None: the mean of the rows of a group)."""

    index: Tensor
    features: Tensor | None = None
    group: Tensor | None = None
    weight: Tensor | None = None
    #: ``index`` ascends (host): nothing has to move
    in_order: bool = False


class PromptStage(ABC):
    """Works on the embedded prompt, before the first decoder layer."""

    positions: Positions = "compact"
    #: fill ``ImageTokens.raw``, the projector output before packing
    wants_raw: bool = False
    #: fill ``ImageTokens.text``, the embedded instruction
    wants_text: bool = False

    @abstractmethod
    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        """One selection per image (None: leave that image untouched)."""
