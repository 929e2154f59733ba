"""Pooling at the language-model input: of every tile, of all crops stitched, of every frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from tokprune.engine.contracts import ImageTokens, Positions, PromptStage, Selection
from tokprune.methods.cells import check_whole, index_of_cells
from tokprune.methods.pooling.stitched import PooledCrops
from tokprune.methods.pooling.tower import centres, window_at
from tokprune.operators.pooling import grid_avg_pool


class PoolStage(PromptStage):
    """Averages p×p windows of every tile's projector output.

    Args:
        window_for: p of a grid (height, width).
        tiled: the model ends rows of tiles with newline tokens.
        wants_raw: pool stills from the projector output of every tile, which the engine then keeps,
            rather than from their tokens.
    """

    def __init__(
        self, window_for: Callable[[tuple[int, int]], int], tiled: bool, positions: Positions,
        wants_raw: bool = True,
    ) -> None:  # fmt: skip
        self.window_for, self.tiled, self.positions = window_for, tiled, positions
        self.wants_raw = wants_raw

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return [self._one(image, self.window_for(image.grid)) for image in images]

    def _one(self, image: ImageTokens, p: int) -> Selection | None:
        if p == 1:
            return None
        check_whole(image, "pool")
        if image.video or not self.wants_raw:
            return self._tiles(image, p)
        return self._still(image, p)

    def _tiles(self, image: ImageTokens, p: int) -> Selection:
        """Every tile or frame, from the tokens at the language-model input; newline tokens stay."""
        (height, width), frames, features = image.grid, image.tiles, image.features
        index = rearrange(index_of_cells(image), "(frame cell) -> frame cell", frame=frames)
        down, across = -(-height // p), -(-width // p)
        cell = torch.arange(height * width, device=index.device)
        window = cell // width // p * across + cell % width // p
        if height % p or width % p:
            pooled = _window_means(features[index], window, down * across)
        else:
            pooled = grid_avg_pool(features[index], window=p, grid=image.grid)
        y = (torch.arange(down, device=index.device) * p + p // 2).clamp(max=height - 1)
        x = (torch.arange(across, device=index.device) * p + p // 2).clamp(max=width - 1)
        stand_ins = index[:, (y[:, None] * width + x).flatten()]
        last = torch.arange(frames * height * width, image.count, device=index.device)
        windows = down * across
        return Selection(
            torch.cat([stand_ins.flatten(), last]),
            torch.cat([pooled.flatten(0, 1).to(features.dtype), features[last]]),
            torch.where(
                image.newline,
                frames * windows + image.newline.cumsum(0) - 1,
                image.tile * windows + image.row // p * across + image.col // p,
            ),
        )

    def _still(self, image: ImageTokens, p: int) -> Selection:
        """Base tile, then the stitched crops with a newline token after each pooled row; or one
        newline token where a tiled model has no crops."""
        assert image.raw is not None
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


def _window_means(x: Tensor, window: Tensor, windows: int) -> Tensor:
    """Means [tiles, windows, D] of the cells of ``x`` [tiles, N, D] in each ``window`` [N]."""
    total = torch.zeros(len(x), windows, x.shape[2], device=x.device)
    members = torch.zeros(windows, device=x.device)
    members = members.index_add(0, window, torch.ones_like(window, dtype=members.dtype))
    return total.index_add(1, window, x.float()) / members[:, None]
