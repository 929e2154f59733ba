"""Ways to cut a call of the vision encoder into pieces, by how its pixels are laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from tokprune.engine.model import ImageLayout, Tiles
from tokprune.engine.pieces import Piece


def spans(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Runs [start, end) of neighbours whose sizes come to no more than ``most``; what is larger by
    itself stands alone."""
    found, start, size = [], 0, 0
    for i, own in enumerate(sizes):
        if i > start and size + own > most:
            found.append((start, i))
            start, size = i, 0
        size += own
    return [*found, (start, len(sizes))]


def cut_rows(
    call: Mapping[str, Any], images: list[ImageLayout] | Tiles, most: int, names: Sequence[str]
) -> list[Piece]:
    """Images, or tiles, that are a row each of the arguments ``names`` (those of them that the call
    has)."""
    given = {name: call[name] for name in names if call.get(name) is not None}
    number = len(given[names[0]])
    found = []
    for a, b in spans([1] * number, most):
        own = replace(images, count=b - a) if isinstance(images, Tiles) else images[a:b]
        found.append(Piece({name: value[a:b] for name, value in given.items()}, own, a))
    return found


def cut_frames(
    call: Mapping[str, Any], videos: list[ImageLayout], most: int, name: str
) -> list[Piece]:
    """Videos of equally many frames, in pixels [videos, frames, …] of the argument ``name``."""
    found, pixels = [], call[name]
    for number, video in enumerate(videos):
        for part in video.parts(most):
            a, b = part.first_frame, part.first_frame + part.frames
            own = pixels[number : number + 1, a:b]
            found.append(Piece({name: own}, [part], number, a > 0))
    return found


def cut_grids(
    call: Mapping[str, Any], images: list[ImageLayout], most: int, name: str, grid: str
) -> list[Piece]:
    """Images whose patches are one sequence of rows of ``name``; the argument ``grid`` [images, 3]
    says how many (height, width) of how many frames."""
    given = call[name], call[grid]
    sizes = [_patches(image) for image in images]
    found, start = [], 0
    for a, b in spans([1] * len(images), most):
        end = start + sum(sizes[a:b])
        found.append(Piece({name: given[0][start:end], grid: given[1][a:b]}, images[a:b], a))
        start = end
    return found


def cut_grid_frames(
    call: Mapping[str, Any], videos: list[ImageLayout], most: int, name: str, grid: str
) -> list[Piece]:
    """The same of videos, whose frames (temporal groups) follow each other."""
    found, start = [], 0
    for number, video in enumerate(videos):
        for part in video.parts(most):
            end = start + _patches(part)
            own: Tensor = call[grid][number : number + 1].clone()
            own[:, 0] = part.frames
            changes = {name: call[name][start:end], grid: own}
            found.append(Piece(changes, [part], number, part.first_frame > 0))
            start = end
    return found


def _patches(image: ImageLayout) -> int:
    assert image.segments is not None
    return sum(image.segments.full)


def cut_tiles(
    call: Mapping[str, Any], images: list[ImageLayout], most: int, name: str,
    names: Sequence[str], runs: Sequence[tuple[int, int]],
) -> list[Piece]:  # fmt: skip
    """Images of several tiles, which the model puts together: all tiles of an image stay in one
    piece.

    Args:
        name: argument of the pixels, [images, tiles, …] or the tiles of all images [tiles, …].
        names: other arguments with a row for each image.
        runs: [start, end) of images that may share a piece.
    """
    pixels = call[name]
    sizes = [image.tiles for image in images]
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    found = []
    for start, end in runs:
        for a, b in spans(sizes[start:end], most):
            first, last = start + a, start + b
            own = slice(first, last) if pixels.dim() == 5 else slice(starts[first], starts[last])
            changes = {name: pixels[own], **{n: call[n][first:last] for n in names}}
            found.append(Piece(changes, images[first:last], first))
    return found
