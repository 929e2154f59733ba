"""What the engine knows of a model: its modules, its facts, how its images become tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

#: what of a video is compressed as one: all of it, segments of so many frames, every frame
VideoUnit: TypeAlias = 'Literal["video", "frame"] | int'


@dataclass(frozen=True)
class ModelFacts:
    """Host-side facts about a model, for validation and for sizing budgets.

    ``feature_layer`` is the 0-based encoder layer whose output becomes the image features, or
    None where several layers are concatenated. ``tokens_per_tile`` counts feature rows of one
    tile (CLS included only where the model keeps it, ``cls_in_features``). ``videos``: whether
    the model takes videos, whose frames are the tiles of one "image"; ``frame_grid``: grid of a
    frame at the language-model input, where the model pools frames on the way there.
    ``max_visual_tokens``: the most that one image can have; on models that take videos no less
    than the decoder has positions.
    """

    family: str
    encoder_layers: int
    feature_layer: int | None
    grid: tuple[int, int]
    tokens_per_tile: int
    has_cls: bool
    cls_in_features: bool
    max_tiles: int
    tiled: bool
    max_visual_tokens: int
    decoder_layers: int
    videos: bool = False
    frame_grid: tuple[int, int] | None = None

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Parts:
    """The modules of one model that the engine hooks.

    ``multimodal`` is the module whose forward calls ``language_model`` with the embedded prompt
    (in transformers it owns ``get_image_features``); ``rotary``: (hidden, positions [B, L]) → cos,
    sin [B, L, d]; ``encoder_layers`` have ``self_attn``, ``layer_norm2`` and ``mlp``;
    ``decoder_layers`` have ``self_attn`` (``q_proj``, ``k_proj``), ``input_layernorm``, ``mlp``.
    """

    multimodal: Any
    tower: Any
    encoder_layers: list[Any]
    projector: Any
    language_model: Any
    decoder_layers: list[Any]
    rotary: Any
    image_token_id: int
    video_token_id: int | None = None
    #: pools the frames of a video before the projector, in models that do
    resampler: Any = None

    def visual(self, input_ids: Tensor) -> Tensor:
        """[B, L] bool: which of the ids [B, L] stand for images and videos."""
        found = input_ids == self.image_token_id
        return found if self.video_token_id is None else found | (input_ids == self.video_token_id)


@dataclass(frozen=True)
class TokenGrid:
    """How the patches of an image become fewer cells, where the model pools or shrinks its tiles
    between tower and prompt.

    ``grids``: (height, width) at the language-model input of every frame of a video, or of the
    base tile and the map of all crops; their cells are numbered one grid after the other.
    ``mean``: values [tiles, N] of the tower's patches (float) → [cells], averaged as the features
    are (where those are not averaged, over the patches that the cell covers). ``nearest``
    [tiles · N] (CPU): the cell that shows each patch, −1 where it is cropped away; None for videos.
    """

    grids: tuple[tuple[int, int], ...]
    mean: Callable[[Tensor], Tensor]
    nearest: Tensor | None = None


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
    are not F. ``first_frame``: of a part of a video.
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

    def parts(self, video_unit: VideoUnit) -> list[ImageLayout]:
        """The video cut into the parts that are compressed as one; a still image as it is."""
        if (
            not self.video
            or video_unit == "video"
            or (video_unit != "frame" and video_unit >= self.frames)
        ):
            return [self]
        length = 1 if video_unit == "frame" else video_unit
        cells = int((self.packed >= 0).sum()) // self.frames
        parts = []
        for first in range(0, self.frames, length):
            last = min(first + length, self.frames)
            # newline tokens that end the video stay with its last part
            end = len(self.packed) if last == self.frames else last * cells
            own = self.packed[first * cells : end]
            token_grid = self.token_grid
            if token_grid is not None:
                token_grid = replace(token_grid, grids=token_grid.grids[first:last])
            parts.append(
                replace(
                    self, packed=torch.where(own < 0, own, own - first * cells),
                    tiles=last - first, frames=last - first, token_grid=token_grid,
                    first_frame=first,
                )
            )  # fmt: skip
        return parts
