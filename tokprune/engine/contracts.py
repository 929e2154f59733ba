"""What a method hands to the engine: stages, and what the engine hands to them.

A method describes itself by a :class:`Plan` of up to three kinds of stages. Stages are static
(built once per patch); each forward starts a fresh *run* from every stage, so no state of one
forward can reach another. Runs see tensors and book-keeping only, never transformers modules.

Stage places, in the order a visual token meets them::

    encoder block, between attention and MLP   EncoderRun.between
    encoder block, at its end                  EncoderRun.after
    language model's door (after projector)    PromptStage.select
    before decoder layer l, prefill            DecoderRun.before_layer
    KV cache, end of prefill                   DecoderRun.after_prefill
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokprune.engine.model import ModelFacts, Per
from tokprune.operators.anyres import tile_windows
from tokprune.operators.attention import attention_rows

Positions = Literal["compact", "preserve"]
Order = Literal["published", "spatial"]


def visible_rows(
    index: Tensor, keys: int, valid: Tensor | None, window: tuple[Tensor, int] | None
) -> Tensor:
    """Keys that causal queries at ``index`` [B, R] among ``keys`` tokens see: bool [B, R, keys].

    ``valid`` [B, keys]: real keys (None: all); ``window``: rotary positions [B, keys] and width
    where attention slides.
    """
    allowed = torch.arange(keys, device=index.device)[None, None, :] <= index[:, :, None]
    if window is not None:
        position, width = window
        own = position.gather(1, index)
        allowed = allowed & (own[:, :, None] - position[:, None, :] < width)
    return allowed if valid is None else allowed & valid[:, None, :]


class Attention:
    """One attention call as a tap sees it; computes only the rows that are asked for.

    ``query`` [B, H, Lq, d] and ``key``, ``value`` [B, Hkv, Lk, d] as the backend gets them
    (after rotary, heads not repeated); ``valid`` [B, Lk] marks real keys (None: all).
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        *,
        causal: bool,
        valid: Tensor | None,
        past: int = 0,
        window: tuple[Tensor, int] | None = None,
        rotary: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.scaling, self.causal, self.valid, self.past = scaling, causal, valid, past
        #: gives cos and sin [B, Lq, d] of the decoder's rotary embedding at the queries' positions
        self.rotary = rotary
        #: (rotary positions of the keys [B, Lk], width) where attention slides
        self.window = window

    def rows(self, index: Tensor) -> Tensor:
        """Softmax rows of the queries at ``index`` [B, R]: float32 [B, H, R, L].

        Probabilities over every visible key (causality and padding respected); columns of keys
        that an earlier turn cached are left out of the result, not out of the softmax.
        """
        b, h, length, d = self.query.shape
        gather = index[:, None, :, None].expand(b, h, index.shape[1], d)
        keys = self.key.shape[2]
        allowed = None if self.valid is None else self.valid[:, None, :]
        if self.causal:
            allowed = visible_rows(index + keys - length, keys, self.valid, self.window)
        rows = attention_rows(self.query.gather(2, gather), self.key, self.scaling, allowed)
        return rows[..., self.past :]

    def received(self, others_only: bool = False, block: int = 64) -> Tensor:
        """Mean attention that each key receives from the real queries: float32 [B, L].

        Mean over heads and queries (``others_only``: the token itself left out); the map is made
        ``block`` rows at a time and never held whole.
        """
        batch, tokens = self.query.shape[0], self.query.shape[2]
        arange = torch.arange(tokens, device=self.query.device)
        total = torch.zeros(batch, tokens, device=arange.device)
        for part in arange.split(block):
            index = part.expand(batch, -1)
            rows = self.rows(index).mean(1)
            if others_only:
                rows = rows.scatter(2, index[:, :, None], 0.0)
            if self.valid is not None:
                rows = rows.masked_fill(~self.valid[:, part, None], 0.0)
            total = total + rows.sum(1)
        real = tokens if self.valid is None else self.valid.sum(1, keepdim=True)
        return total / (real - others_only if others_only else real)

    def cls_row(self) -> Tensor:
        """Row of the class token (query 0), head by head: float32 [B, H, Lk]."""
        index = torch.zeros(self.query.shape[0], 1, dtype=torch.long, device=self.query.device)
        return self.rows(index)[:, :, 0]


# ---------------------------------------------------------------------------- encoder


@dataclass(frozen=True)
class TowerInput:
    """What one run of the vision encoder processes: ``image_of_tile[b]`` is the number of the
    image that tile (batch row) ``b`` belongs to; an image's tiles are consecutive, base first.
    ``tile_grids[i]``: crops (down, across) of image ``i``, (0, 0) without any. ``sizes[i]``: its
    (height, width) in pixels, None where nothing is padded. ``videos[i]``: whether it is a video,
    whose frames are its tiles, in order."""

    facts: ModelFacts
    image_of_tile: tuple[int, ...]
    device: torch.device
    tile_grids: tuple[tuple[int, int], ...] = ()
    sizes: tuple[tuple[int, int] | None, ...] = ()
    videos: tuple[bool, ...] = ()

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
    and for padding; ``valid`` [B, T] bool, None while no row is padding; ``group`` [B, N]: row
    that now holds each original patch, −1 if dropped; ``counts``: real rows per tile (host),
    class token included.
    """

    has_cls: bool
    slots: Tensor
    group: Tensor
    counts: list[int]
    valid: Tensor | None = None

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
    """What an encoder run says at the end, row-aligned with the final patch rows.

    ``score`` and ``tag`` [tiles, T]: carried to the prompt and the decoder stages; ``key``
    [tiles, T]: integer sort key of the published order inside one image (None: tile by tile,
    row by row), with an entry for the class token where the model keeps it; ``unpad``:
    rows on cells that the model's own packing crops away are dropped.
    """

    score: Tensor | None = None
    tag: Tensor | None = None
    key: Tensor | None = None
    unpad: bool = True


class EncoderRun:
    """One forward through the vision encoder. All hooks default to doing nothing."""

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        """Called right after the attention of a tapped layer."""

    def bias(self, layer: int, tokens: TowerTokens) -> Tensor | None:
        """Additive attention bias [B, 1, 1, T] (float32) for this layer, or None."""
        return None

    def between(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        """After attention and its residual, before the MLP; ``hidden`` [B, T, D]."""
        return None

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        """After the whole block; ``hidden`` [B, T, D]."""
        return None

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return EncoderOutcome()


class EncoderStage(ABC):
    """Static description of work inside the vision encoder (0-based layer numbers)."""

    taps: frozenset[int] = frozenset()
    between_layers: frozenset[int] = frozenset()
    after_layers: frozenset[int] = frozenset()
    bias_layers: frozenset[int] = frozenset()
    #: order in which the surviving tokens enter the prompt
    order: Order = "spatial"
    #: positions of the shortened prompt
    positions: Positions = "compact"

    @property
    def reduces(self) -> bool:
        return bool(self.between_layers or self.after_layers)

    @property
    def reduces_videos(self) -> bool:
        """Whether it drops or merges rows of videos, too; models that pool the whole grid of every
        frame cannot have that."""
        return self.reduces

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


# ---------------------------------------------------------------------------- prompt


@dataclass
class ImageTokens:
    """Visual tokens of one image at the language model's door, in prompt order.

    ``features`` [n, D] after the projector; ``tile``, ``row``, ``col`` [n] long: tile number
    (0 = base) and cell on that tile's grid, −1 for newline tokens and for the class token;
    ``column`` [n]: prompt column; ``newline`` [n] bool; ``patches``: how many are no newline
    (host); ``score``, ``tag`` [n]: what an encoder run left, or None; ``tiles``, ``grid``: host;
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
    raw: Tensor | None = None
    newline_feature: Tensor | None = None
    #: (height, width) of the picture in pixels, where the family knows it (host)
    size: tuple[int, int] | None = None
    #: tiles across and down the stitched picture (host), base excluded; (0, 0) without tiling
    tile_grid: tuple[int, int] = (0, 0)
    #: frames of a video, or of the part of it that is compressed as one (host): its tiles, so
    #: that ``tile`` is a token's frame; 1 for a still
    frames: int = 1
    text: Tensor | None = None
    video: bool = False
    #: grid of each tile (host) where they differ: a picture whose stitched crops the model shrinks
    #: has two "tiles", the base and the shrunk map
    grids: tuple[tuple[int, int], ...] | None = None

    @property
    def count(self) -> int:
        return self.features.shape[0]

    def tile_grids(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every tile's grid; host."""
        return (self.grid,) * self.tiles if self.grids is None else self.grids

    def windows(self) -> list[tuple[int, int, int, int]]:
        """Of every tile the cells that show the picture and no padding: (top, bottom, left,
        right), half open; host."""
        if self.video or self.grids is not None:
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
    [n] names the output row that holds each input row (−1 = dropped)."""

    index: Tensor
    features: Tensor | None = None
    group: Tensor | None = None


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


# ---------------------------------------------------------------------------- decoder


@dataclass
class SequenceView:
    """The sequence as it is now, entering some decoder layer (prefill).

    Tensors are [B, L]: ``column``: prompt column, −1 = padding; ``position``: rotary position;
    ``segment``: number of the image inside its batch row (0…S−1), −1 for text, newline tokens
    included with their image; ``after``: real text after the last visual token of the row;
    ``tag``: marks from the encoder run or None. Host side: ``counts[b][s]`` visual tokens alive,
    ``entering[b][s]`` the same when they entered the decoder, ``text_after[b]`` real text tokens
    after the last visual token, ``lengths[b]`` real tokens.
    """

    column: Tensor
    position: Tensor
    segment: Tensor
    after: Tensor
    counts: list[list[int]]
    entering: list[list[int]]
    text_after: list[int]
    lengths: list[int]
    #: [B] rotary position that the token after this sequence gets
    next_position: Tensor
    tag: Tensor | None = None
    padded: bool = False

    @property
    def valid(self) -> Tensor:
        return self.column >= 0

    @property
    def visual(self) -> Tensor:
        return self.segment >= 0

    @property
    def segments(self) -> int:
        """Largest number of images of one batch row."""
        return max((len(c) for c in self.counts), default=0)

    def text_rows(self) -> tuple[Tensor, Tensor]:
        """Indices of the text after the last image, right-aligned: (index [B, R], real [B, R]).

        R is the largest count of the batch, known on the host; where a row has less, the
        leading entries are not real. R = 0 if no row has text after its image.
        """
        r = max(self.text_after, default=0)
        arange = torch.arange(self.after.shape[1], device=self.after.device)
        key = torch.where(self.after, arange, torch.full_like(arange, -1))
        top = key.sort(dim=1, stable=True).values[:, key.shape[1] - r :]
        return top.clamp(min=0), top >= 0

    def last_row(self) -> Tensor:
        """Index of the last real token of every row: [B, 1]."""
        arange = torch.arange(self.column.shape[1], device=self.column.device)
        return torch.where(self.valid, arange, torch.zeros_like(arange)).amax(1, keepdim=True)


@dataclass
class Keep:
    """Answer of a decoder run: ``mask`` [B, L] bool, True where a *visual* token stays (text is
    always kept). ``counts[b][s]``: how many stay per image (host); None where the numbers are
    adaptive, then the engine reads them back (one host synchronisation).

    Merges: ``hidden`` [B, L, D] replaces the sequence before the drop (a merged token takes the
    place of one of the tokens it stands for); ``group`` [B, L]: the place that holds each token
    from now on, −1 if dropped (None: each its own). ``order`` [B, L] long: sort key ≥ 0 of the
    new sequence (None: as before)."""

    mask: Tensor
    counts: list[list[int]] | None = None
    positions: Positions = "preserve"
    hidden: Tensor | None = None
    group: Tensor | None = None
    order: Tensor | None = None


@dataclass
class CachePolicy:
    """Answer of a decoder run at the end of prefill. ``index[l]`` [B, n']: of the sequence that
    layer ``l`` cached in this prefill, the places that stay (−1 = padding at the left); layers
    that are not named, and entries of earlier turns, stay as they are.
    ``continue_positions``: decode steps go on with the prefill numbering of each layer; else their
    position is the number of entries in the layer's cache."""

    index: dict[int, Tensor] = field(default_factory=dict)
    #: real entries per batch row of the layers in ``index`` (host)
    lengths: dict[int, list[int]] = field(default_factory=dict)
    continue_positions: bool = True


class ScoringLayer(ABC):
    """Query and key projections of the decoder layer about to run, for methods that rank with
    them (they are computed for this purpose: the layer itself runs on the survivors only)."""

    @abstractmethod
    def probabilities(self, hidden: Tensor, rows: Tensor, view: SequenceView) -> Tensor:
        """Softmax rows of the queries at ``rows`` [B, R] over all visible keys of ``hidden``
        [B, L, D], rotated at the current positions: float32 [B, H, R, L]."""

    @abstractmethod
    def final_norm(self, hidden: Tensor) -> Tensor:
        """The decoder's final norm, which it applies to its last layer, on ``hidden`` [B, L, D]."""


class DecoderRun:
    """One prefill through the decoder. All hooks default to doing nothing."""

    def attention(self, layer: int, attention: Attention, view: SequenceView) -> None:
        """Called right after the attention of a tapped layer."""

    def transition(
        self, layer: int, module: Literal["attention", "mlp"], before: Tensor, after: Tensor,
        view: SequenceView,
    ) -> None:  # fmt: skip
        """Input (after its norm) and output (before the residual) of a module, [B, L, D]."""

    def before_layer(
        self, layer: int, hidden: Tensor, view: SequenceView, scoring: ScoringLayer
    ) -> Keep | None:
        """Before decoder layer ``layer`` (0-based) runs; ``hidden`` [B, L, D]."""
        return None

    def dropped(self, layer: int, index: Tensor) -> None:
        """After a drop: ``index`` [B, L'] old place of every surviving entry (padding clamped),
        so that per-token state can follow."""

    def after_prefill(self, views: Sequence[SequenceView]) -> CachePolicy | None:
        """End of prefill; ``views[l]`` is the sequence that layer ``l`` cached."""
        return None


class DecoderStage(ABC):
    """Static description of work inside the decoder (0-based layer numbers)."""

    taps: frozenset[int] = frozenset()
    transition_layers: frozenset[int] = frozenset()
    prune_layers: frozenset[int] = frozenset()
    has_cache_policy: bool = False

    @abstractmethod
    def start(self) -> DecoderRun: ...


# ---------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """The stages of one method (or of a composition) on one model. ``per``: what of a video the
    prompt and decoder stages see as one image (:attr:`tokprune.methods.base.Method.per`)."""

    encoder: tuple[EncoderStage, ...] = ()
    prompt: tuple[PromptStage, ...] = ()
    decoder: tuple[DecoderStage, ...] = ()
    per: Per = "video"
