"""What the engine knows of a model: its modules, its facts, how its images become tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tokprune.errors import UnsupportedModelError

#: what of a video is compressed as one: all of it, segments of so many frames, every frame
VideoUnit: TypeAlias = 'Literal["video", "frame"] | int'


@dataclass(frozen=True)
class TowerFacts:
    """What stages inside the vision encoder need to know of it.

    ``feature_layer`` is the 0-based encoder layer whose output becomes the image features, or
    None where several layers are concatenated. ``grid``: (height, width) in patches of a tile;
    ``tokens_per_tile`` counts feature rows of one tile (CLS included only where the model keeps
    it, ``cls_in_features``); ``max_tiles``: of one image; ``tiled``: tiles and newline tokens.
    ``merges``: the model makes one token of so many patches, each way, after the tower. Where
    grids vary, ``grid`` is (0, 0).
    """

    encoder_layers: int
    feature_layer: int | None
    grid: tuple[int, int]
    tokens_per_tile: int
    has_cls: bool
    cls_in_features: bool
    max_tiles: int = 1
    tiled: bool = False
    merges: int = 1
    #: encoder layers that see whole images, where others see windows of them; None: all
    whole_layers: tuple[int, ...] | None = None

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class ModelFacts:
    """Host-side facts about a model, for validation and for sizing budgets.

    ``max_visual_tokens``: the most that one image can have; where grids vary, and on models that
    take videos, no less than the decoder has positions. ``axes``: of a rotary position, 1, or 3
    (time, height, width) under M-RoPE. ``videos``: whether the model takes videos, whose frames
    are the tiles of one "image"; ``frame_grid``: grid of a frame at the language-model input,
    where the model pools frames on the way there. ``attention_layers``: decoder layers that have
    attention; None: all. ``tower``: None where no stage can change what is inside the vision
    encoder, for the reason ``no_tower``; ``observed``: then, where stages can look at it.
    ``per_tile``: what counts as an image is a tile, as the model cannot
    tell which of them are one image.
    """

    family: str
    decoder_layers: int
    max_visual_tokens: int
    axes: int = 1
    videos: bool = False
    frame_grid: tuple[int, int] | None = None
    attention_layers: frozenset[int] | None = None
    tower: TowerFacts | None = None
    observed: TowerFacts | None = None
    #: stages made for it may drop rows of the observed encoder
    packed: bool = False
    #: stages made for encoders that pack their images may read the outputs of its blocks
    readable: bool = False
    no_tower: str = ""
    per_tile: bool = False

    def need_tower(self, method: str, whole: bool = True) -> TowerFacts:
        """The tower's facts.

        Args:
            method: who asks, for the text.
            whole: its rows are to change, not only to be looked at.

        Raises:
            UnsupportedModelError: no stage can work there; says why, and which methods work.
        """
        tower = self.tower if whole or self.tower is not None else self.observed
        if tower is None:
            raise UnsupportedModelError(
                f"{method} works inside the vision encoder, which {self.family} does not allow: "
                f"{self.no_tower}. Methods that select at the language-model input (divprune, "
                "cdpruner, todre, grid, random, centerclip with place='projector', pool) or in "
                "the decoder (fastv, dart, pyramiddrop, sparsevlm, transprune, mustdrop with "
                "spatial=False and key_rate=0) work on it"
            )
        return tower


@dataclass(frozen=True)
class Block:
    """A decoder layer. Names differ between models, roles do not.

    ``attention_out``, ``mlp_out``: the modules whose outputs enter the residual; ``window``: keys
    that its attention sees where it slides, in tokens; ``has_attention``: False for linear
    attention, whose state is no list of keys.
    """

    module: Any
    attention: Any
    attention_out: Any
    mlp: Any
    mlp_out: Any
    window: int | None = None
    has_attention: bool = True

    @property
    def reads_positions(self) -> bool:
        """Whether its attention looks at ``position_ids`` itself, beside rotary embeddings."""
        return "position_ids" in inspect.signature(type(self.attention).forward).parameters


@dataclass(frozen=True)
class Deep:
    """Features ``values`` [n, D] that the model adds to the hidden states after decoder layer
    ``layer``; ``row`` [B, L]: the one of every token of the prompt, −1 at text."""

    layer: int
    values: Tensor
    row: Tensor

    def at(self, place: Tensor | None) -> Tensor:
        """What is added to the tokens at ``place`` [B, L'] of the prompt (None: to all), zero at
        text: [B, L', D]."""
        row = self.row if place is None else self.row.gather(1, place.to(self.row.device))
        return self.values[row.clamp(min=0)].masked_fill_((row < 0)[:, :, None], 0)


@dataclass(frozen=True)
class Tower:
    """The vision encoder, for stages that work inside it. ``layers`` have ``self_attn``,
    ``layer_norm2`` and ``mlp``; ``projector`` maps [tiles, rows, D] to features."""

    module: Any
    layers: list[Any]
    projector: Any
    #: pools the frames of a video before the projector, in models that do
    resampler: Any = None
    #: the model reads the tower's output, behind its last norm, and not the output of a layer
    reads_output: bool = False
    #: what the model multiplies the projector's output by
    scale: float = 1.0

    @property
    def embeddings(self) -> Any:
        """The module that makes rows of pixels, positions added."""
        return getattr(self.module, "vision_model", self.module).embeddings


@dataclass(frozen=True)
class ObservedTower:
    """A vision encoder that stages can look at: the attention modules of its blocks; ``packed``:
    its images stand in one sequence, frame after frame; ``raster``: the patches of an image in
    raster order, and not those of a token one after the other."""

    module: Any
    attentions: list[Any]
    packed: bool = False
    raster: bool = True
    #: blocks and merger of a packed encoder whose rows stages may read, and some of them drop
    blocks: tuple[Any, ...] = ()
    merger: Any = None


@dataclass(frozen=True)
class Parts:
    """The modules of one model that the engine hooks.

    ``multimodal`` is the module whose forward calls ``language_model`` with the embedded prompt
    (in transformers it owns ``get_image_features``); ``encoder``: what turns pixels into visual
    tokens, tower and projector or merger, counted as a whole; ``tower``: the same for stages
    inside it, None where there can be none.
    """

    multimodal: Any
    language_model: Any
    decoder_layers: list[Block]
    image_token_id: int
    video_token_id: int | None = None
    encoder: Any = None
    tower: Tower | None = None
    observed: ObservedTower | None = None

    @property
    def rotary(self) -> list[Any]:
        """Modules of the language model that make its rotary tables."""
        children = self.language_model.named_children()
        return [module for name, module in children if "rotary" in name]

    def visual(self, input_ids: Tensor) -> Tensor:
        """[B, L] bool: which of the ids [B, L] stand for images and videos."""
        found = input_ids == self.image_token_id
        return found if self.video_token_id is None else found | (input_ids == self.video_token_id)


@dataclass(frozen=True)
class TokenGrid:
    """How the patches of an image become fewer cells, where the model pools or shrinks its tiles
    between tower and prompt.

    ``grids``: (height, width) at the language-model input of every frame of a video, of every
    tile, or of the base tile and the map of all crops; their cells are numbered one grid after the
    other. ``mean``: values [tiles, N, …] of the tower's patches (float) → [cells, …], averaged as
    the features are (where those are not averaged, over the patches that the cell covers); None
    where no stage looks at the tower. ``nearest`` [tiles · N] (CPU): the cell that shows each
    patch, −1 where it is cropped away; None for videos.
    """

    grids: tuple[tuple[int, int], ...]
    mean: Callable[[Tensor], Tensor] | None = None
    nearest: Tensor | None = None


@dataclass(frozen=True)
class Segments:
    """Rows of a vision encoder that attend to each other: lengths of all segments, in the layers
    that see whole images, and in those that slide windows over them."""

    full: tuple[int, ...]
    windows: tuple[int, ...]


@dataclass(frozen=True)
class ImageLayout:
    """How the feature rows of one image's tiles become its prompt tokens.

    ``packed`` [n] (CPU): for each prompt token of the image, in order, ``tile · F + row`` of the
    feature it takes (F = feature rows per tile), or −1 for a newline token. ``tiles``: number of
    tiles, base included. ``size``: (height, width) in pixels or None. ``tile_grid``: tiles (down,
    across) of the stitched image, base excluded, (0, 0) where there is only the base.

    A video is one image: its ``frames`` (1 for a still image) are its tiles, in order.
    ``token_grid``: where the model pools or shrinks the tiles; ``packed`` then numbers cells
    at the language-model input. ``projected``: rows of a tile that the projector sees, where they
    are not F. ``first_frame``: of a part of a video. ``broken``: text stands between its tokens
    (after every row, between frames). ``segments``: rows that the vision encoder works on, by what
    attends to each other, where no stage works inside it: see :class:`Segments`.
    """

    packed: Tensor
    tiles: int
    size: tuple[int, int] | None = None
    tile_grid: tuple[int, int] = (0, 0)
    frames: int = 1
    video: bool = False
    token_grid: TokenGrid | None = None
    projected: int | None = None
    first_frame: int = 0
    broken: bool = False
    segments: Segments | None = None

    @property
    def count(self) -> int:
        """Prompt tokens that the model makes of it."""
        return len(self.packed)

    @property
    def patches(self) -> int:
        """Those of them that are no newline tokens."""
        return int((self.packed >= 0).sum())

    def parts(self, video_unit: VideoUnit) -> list[ImageLayout]:
        """The video cut into the parts that are compressed as one; a still image as it is."""
        if (
            not self.video
            or video_unit == "video"
            or (video_unit != "frame" and video_unit >= self.frames)
        ):
            return [self]
        length = 1 if video_unit == "frame" else video_unit
        # with what stands before the cells of each frame
        cells = int((self.packed >= 0).sum()) // self.frames
        length_of = cells + int(self.packed[0] < 0)
        parts = []
        for first in range(0, self.frames, length):
            last = min(first + length, self.frames)
            # newline tokens that end the video stay with its last part
            end = len(self.packed) if last == self.frames else last * length_of
            own = self.packed[first * length_of : end]
            token_grid = self.token_grid
            if token_grid is not None:
                token_grid = replace(token_grid, grids=token_grid.grids[first:last])
            parts.append(
                replace(
                    self, packed=torch.where(own < 0, own, own - first * cells),
                    tiles=last - first, frames=last - first, token_grid=token_grid,
                    first_frame=first, segments=_part(self.segments, first, last, self.frames),
                )
            )  # fmt: skip
        return parts


def _part(segments: Segments | None, first: int, last: int, frames: int) -> Segments | None:
    """Those of some frames of a video."""
    if segments is None:
        return None
    full, windows = segments.full, segments.windows
    a, b = len(full) // frames, len(windows) // frames
    return Segments(full[first * a : last * a], windows[first * b : last * b])


@dataclass(frozen=True)
class Tiles:
    """Images of which the model knows the tiles alone: every run of placeholders is one image of
    as many tiles as it has room for. ``grid``: (height, width) of a tile at the language-model
    input; ``count``: tiles of the call, None where only the pixels' values tell."""

    grid: tuple[int, int]
    count: int | None = None
    #: of every tile, for FLOPs
    segments: Segments | None = None
    #: as of a :class:`TokenGrid`
    mean: Callable[[Tensor], Tensor] | None = None

    @property
    def per_tile(self) -> int:
        """Tokens of a tile."""
        return self.grid[0] * self.grid[1]

    def image(self, tiles: int) -> ImageLayout:
        """An image of so many tiles."""
        rows = None if self.segments is None else Segments(
            self.segments.full * tiles, self.segments.windows * tiles
        )  # fmt: skip
        return ImageLayout(
            torch.arange(tiles * self.per_tile), tiles,
            token_grid=TokenGrid((self.grid,) * tiles, self.mean), segments=rows,
        )  # fmt: skip
