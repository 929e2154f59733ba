"""What stages inside the vision encoder get and give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from tokprune.engine.contracts.attention import Attention
from tokprune.engine.model import TowerFacts

Positions = Literal["compact", "preserve"]
Order = Literal["published", "spatial"]
Across = Literal["tile", "image", "call"]

#: slot of a row that a stage added (:attr:`EncoderStage.extra_tokens`)
ADDED = -2


@dataclass(frozen=True)
class TowerInput:
    """What one run of the vision encoder processes: ``image_of_tile[b]`` is the number of the
    image that tile (batch row) ``b`` belongs to; an image's tiles are consecutive, base first.
    ``tile_grids[i]``: crops (down, across) of image ``i``, (0, 0) without any. ``sizes[i]``: its
    (height, width) in pixels, None where nothing is padded. ``videos[i]``: whether it is a video,
    whose frames are its tiles, in order."""

    facts: TowerFacts
    image_of_tile: tuple[int, ...]
    device: torch.device
    tile_grids: tuple[tuple[int, int], ...] = ()
    sizes: tuple[tuple[int, int] | None, ...] = ()
    videos: tuple[bool, ...] = ()
    #: patches that become a token stand one after the other, cell after cell
    packed: bool = False
    #: frames of the image that a packed encoder's frame belongs to
    frames: int = 1
    #: where the encoder runs in pieces: number of the first image in the call, and all images of it
    #: (0: those of this run)
    first_image: int = 0
    call_images: int = 0

    def by_cell(self, values: Tensor) -> Tensor:
        """Values [B, N] of patches, each replaced by the mean of those that become one token."""
        m, (height, width) = self.facts.merges, self.facts.grid
        if m == 1:
            return values
        if self.packed:
            cells = values.unflatten(1, (-1, m * m)).mean(-1)
            return cells.repeat_interleave(m * m, dim=1)
        cells = avg_pool2d(values.view(-1, 1, height, width), m)
        return interpolate(cells, scale_factor=m, mode="nearest").flatten(1)

    @property
    def tiles_per_image(self) -> list[int]:
        images = self.image_of_tile[-1] + 1 if self.image_of_tile else 0
        return [self.image_of_tile.count(i) for i in range(images)]

    @property
    def has_videos(self) -> bool:
        return any(self.videos)


@dataclass
class TowerTokens:
    """Rows alive in the encoder. Row 0 is the class token where the tower has one.

    ``slots`` [B, T]: grid slot (0…N−1, raster) that each row stands for, −1 for the class token
    and for padding, −2 for rows that a stage added; ``valid`` [B, T] bool, None while no row is
    padding; ``group`` [B, N]: row that now holds each original patch, −1 if dropped; ``counts``:
    real rows per tile (host), class token and added rows included.
    """

    has_cls: bool
    slots: Tensor
    group: Tensor
    counts: list[int]
    valid: Tensor | None = None
    #: [B, T] float32, patches that each row stands for, where attention is rectified; else None
    size: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.slots.shape[1]

    @property
    def first_patch(self) -> int:
        return int(self.has_cls)

    @property
    def patch_valid(self) -> Tensor | None:
        """``valid`` without the class token's column."""
        return None if self.valid is None else self.valid[:, self.first_patch :]

    def carry(self, values: Tensor, seen: TowerTokens) -> Tensor:
        """Values [B, T'] of the patch rows that were alive at ``seen``, at those alive now: each
        row gets the value of the earlier row that held the patch it stands for."""
        if seen is self:
            return values
        slots = self.slots[:, self.first_patch :].clamp(min=0)
        row = seen.group.gather(1, slots) - seen.first_patch
        return values.gather(1, row.clamp(min=0))


@dataclass
class Reduction:
    """New rows from old rows of a [B, T, …] sequence.

    ``rows`` [B, T']: old row that stands for each new row, −1 = padding at the end; a row may
    repeat. ``hidden``: new vectors [B, T', D] (None: gather ``rows``). ``group`` [B, T]: new row
    that holds each old row, −1 if dropped (None: derived from ``rows``). ``counts``: real rows
    per batch row; needed where ``rows`` holds padding.
    """

    rows: Tensor
    hidden: Tensor | None = None
    group: Tensor | None = None
    counts: list[int] | None = None


@dataclass
class EncoderOutcome:
    """What an encoder run says at the end, row-aligned with the final patch rows (all but the class
    token: those that a stage added, too, as long as they are there).

    ``score`` and ``tag`` [tiles, T], ``metric`` [tiles, T, d]: carried to the prompt and the
    decoder stages; ``key`` [tiles, T]: integer sort key of the published order inside one image
    (None: tile by tile, row by row), with an entry for the class token where the model keeps it;
    ``unpad``: rows on cells that the model's own packing crops away are dropped.
    """

    score: Tensor | None = None
    tag: Tensor | None = None
    metric: Tensor | None = None
    key: Tensor | None = None
    unpad: bool = True


class EncoderRun:
    """One forward through the vision encoder. All hooks default to doing nothing."""

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        """Called right after the attention of a tapped layer."""

    def bias(self, layer: int, tokens: TowerTokens) -> Tensor | None:
        """Additive attention bias [B, 1, 1, T] (float32) for this layer, or None."""
        return None

    def activation(self, layer: int, activations: Tensor, tokens: TowerTokens) -> Tensor | None:
        """Inside the MLP, behind its activation function: ``activations`` [B, T, K], which enter
        the second linear map. New ones of the same shape and dtype, or None."""
        return None

    def between(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        """After attention and its residual, before the MLP; ``hidden`` [B, T, D]."""
        return None

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        """After the whole block; ``hidden`` [B, T, D]: its output, or that of the feature layer
        (:attr:`EncoderStage.after_tower`)."""
        return None

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return EncoderOutcome()


class EncoderStage(ABC):
    """Static description of work inside the vision encoder (0-based layer numbers)."""

    taps: frozenset[int] = frozenset()
    between_layers: frozenset[int] = frozenset()
    after_layers: frozenset[int] = frozenset()
    bias_layers: frozenset[int] = frozenset()
    #: layers whose MLP's inner activations a run reads or changes
    activation_layers: frozenset[int] = frozenset()
    #: rows of zeros that are put behind the patches of every tile, once the position embedding was
    #: added, and run through the encoder like any other (register tokens): real rows of slot −2.
    #: Where a reduction keeps them, they enter the prompt behind their image, which gets room for
    #: them; where none is made, they are cut off again at the feature layer
    extra_tokens: int = 0
    #: the feature layer, of a stage that reduces its output only when the last layer has run:
    #: :meth:`EncoderRun.after` of the last layer then gets what the model reads
    after_tower: int | None = None
    #: made for encoders that pack their images: a run sees one frame, and reads or drops rows in
    #: ``after``
    packs: bool = False
    #: order in which the surviving tokens enter the prompt
    order: Order = "spatial"
    #: positions of the shortened prompt
    positions: Positions = "compact"

    #: what the answer for a tile depends on besides itself: nothing, the other tiles or frames of
    #: its image, or all that the encoder runs at once; what is needed must not be cut into pieces
    across: Across = "tile"

    @property
    def reduces(self) -> bool:
        return bool(self.between_layers or self.after_layers or self.after_tower is not None)

    @property
    def reduces_videos(self) -> bool:
        """Whether it drops or merges rows of videos, too; models that pool the whole grid of every
        frame cannot have that."""
        return self.reduces

    @property
    def alters(self) -> bool:
        """Whether the encoder computes something else with it, even where no row is dropped."""
        return bool(self.extra_tokens or self.activation_layers)

    @property
    def share_key(self) -> Hashable | None:
        """What a stage observes, for stages that leave the encoder's rows as they are: stages
        with equal keys have equal outcomes on equal pixels, and one pass of the tower may serve
        them all (:class:`~tokprune.engine.shared_encoder.SharedEncoder`). None: every stage needs
        its own.
        """
        return None

    @abstractmethod
    def start(self, tower: TowerInput) -> EncoderRun: ...
