"""Pooling at the language-model input: of every tile, of all crops stitched, of every frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from tokprune.engine.contracts import ImageTokens, Positions, PromptStage, Selection
from tokprune.methods.cells import index_of_cells
from tokprune.methods.pooling.stitched import PooledCrops
from tokprune.methods.pooling.tower import centres, window_at
from tokprune.operators.pooling import grid_avg_pool


class PoolStage(PromptStage):
    """Averages p×p windows of every tile's projector output.

    Args:
        window_for: p of a grid (height, width).
        tiled: the model ends rows of tiles with newline tokens.
    """

    #: the engine keeps the projector output of every tile
    wants_raw = True

    def __init__(
        self, window_for: Callable[[tuple[int, int]], int], tiled: bool, positions: Positions
    ) -> None:
        self.window_for, self.tiled, self.positions = window_for, tiled, positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return [self._one(image, self.window_for(image.grid)) for image in images]

    def _one(self, image: ImageTokens, p: int) -> Selection | None:
        if p == 1:
            return None
        return self._video(image, p) if image.video else self._still(image, p)

    def _video(self, image: ImageTokens, p: int) -> Selection:
        """Every frame, from the tokens at the language-model input; newline tokens stay."""
        (height, width), frames, features = image.grid, image.frames, image.features
        index = rearrange(index_of_cells(image), "(frame cell) -> frame cell", frame=frames)
        pooled = grid_avg_pool(features[index], window=p, grid=image.grid)
        stand_ins = index[:, centres(image.grid, p, index.device)]
        last = torch.arange(frames * height * width, image.count, device=index.device)
        windows = height // p * (width // p)
        return Selection(
            torch.cat([stand_ins.flatten(), last]),
            torch.cat([pooled.flatten(0, 1).to(features.dtype), features[last]]),
            torch.where(
                image.newline,
                frames * windows + image.newline.cumsum(0) - 1,
                image.tile * windows + window_at(image.row, image.col, p, width),
            ),
        )

    def _still(self, image: ImageTokens, p: int) -> Selection:
        """Base tile, then the stitched crops with a newline token after each pooled row; or one
        newline token where a tiled model has no crops."""
        if image.raw is None:
            raise ValueError(
                "pool needs the whole grid of every tile, and an earlier method has already "
                "dropped or merged patches; leave one of them out"
            )
        height, width = image.grid
        patches = image.raw[:, -height * width :]  # without a class token
        pooled = grid_avg_pool(patches, window=p, grid=image.grid)
        pooled = pooled.to(image.features.device, image.features.dtype)
        index, newlines, windows = index_of_cells(image), _newlines(image), pooled.shape[1]
        features, stand_ins = [pooled[0]], [index[centres(image.grid, p, index.device)]]
        base = (image.tile == 0) & (image.row >= 0)
        group = torch.where(base, window_at(image.row, image.col, p, width), -1)
        if len(pooled) > 1:
            crops = PooledCrops(image, p)
            features.append(crops.features(pooled[1:]))
            stand_ins.append(crops.stand_ins(index, newlines))
            into = crops.group()
            group = torch.where(into < 0, group, windows + into)
        elif self.tiled:
            assert image.newline_feature is not None
            features.append(image.newline_feature[None].to(pooled))
            stand_ins.append(newlines[:1])
            group = torch.where(image.newline, windows, group)
        return Selection(torch.cat(stand_ins).clamp(min=0), torch.cat(features), group)


def _newlines(image: ImageTokens) -> Tensor:
    """[n + 1] long: place of the image's newline tokens among its tokens, in order; the rest
    is of no meaning."""
    rank = torch.where(image.newline, image.newline.cumsum(0) - 1, image.count)
    places = torch.zeros(image.count + 1, dtype=torch.long, device=rank.device)
    return places.scatter(0, rank, torch.arange(image.count, device=rank.device))
