"""Where on an image, and when in a video, kept tokens stand: counts over bands of it."""

from __future__ import annotations

from collections.abc import Sequence

from tokprune.eval.benchmarks.base import Item, evenly_spaced
from tokprune.trace import PrefillTrace
from tokprune.trace.provenance import cells_of_tile, decoder_tokens

#: bands from top to bottom, from left to right, and from the first frame to the last
BANDS = 8
#: questions of a sweep that are counted
_MOST = 200


def placed_items(items: Sequence[Item]) -> frozenset[str]:
    """Ids of the questions whose kept tokens are counted: evenly spaced over all."""
    return frozenset(item.id for item in evenly_spaced(items, _MOST))


def kept_places(prefill: PrefillTrace, row: int) -> dict[str, list[int]] | None:
    """Tokens of a prompt in its last decoder layer that holds any, by the band that they stand in.

    Of an image that is cut into tiles those of the tile that shows all of it; of a video all
    frames. Where tokens have merged, the place is that of the one that the others have joined.

    Returns:
        ``rows`` and ``columns``, counts in eight bands each, and of videos ``frames``; None where
        no token has a place (images that came as embeddings).
    """
    alive = [n for n, layer in enumerate(prefill.layers) if any(layer.counts[row])]
    if not alive:
        return None
    found: dict[str, list[int]] = {}
    shown = [image for image in prefill.images if image.row == row and image.record is not None]
    layouts = [image.record.layout for image in shown if image.record is not None]
    # a video may be in several parts
    frames = max((own.first_frame + own.frames for own in layouts if own.video), default=1)
    for image, layout in zip(shown, layouts, strict=True):
        assert image.record is not None
        (height, width), video = cells_of_tile(image.record), layout.video
        for token in decoder_tokens(prefill, image, alive[-1]):
            if token.kind != "patch" or (token.tile and not video):
                continue
            _count(found, "rows", token.row, height)
            _count(found, "columns", token.col, width)
            if video:
                _count(found, "frames", token.tile, frames)
    return found or None


def _count(found: dict[str, list[int]], name: str, at: int, of: int) -> None:
    counts = found.setdefault(name, [0] * BANDS)
    counts[min(BANDS - 1, max(0, at) * BANDS // max(of, 1))] += 1
