"""Published layer numbers on decoders of another depth.

Papers name decoder layers of LLaVA-1.5-7B, which has 32. The rule, for every method alike:

- a decoder of at least 24 layers gets the published numbers as they are, as in the official code
  (which uses the same numbers for 32 and for 40 layers), if they fit;
- in a shorter one a *schedule* of layers (TransPrune, MustDrop, PyramidDrop, SparseVLM) keeps its
  relative depth: layer l of 32 becomes l · depth / 32, rounded, moved up where two would coincide
  and down where the last would not leave the layers behind it that the method needs; where there
  is no room for all steps, TransPrune takes a single one and the others their last ones;
- K = 2 of FastV and DART, and 3 of PriorTR, means the first layers, not a depth: it stays where
  these are at most a quarter of the model, and becomes a quarter, at least 1, in shorter ones;
- FlowCut's layer 1 stays while at least as many layers follow as precede it, and moves to the
  middle otherwise;
- ToDRE's check after ⌊7L/8⌋ of L layers is a relative depth by definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PUBLISHED_DEPTH = 32
#: decoders from this depth on take the published numbers
LEAST_DEPTH = 24

#: FastV, DART: layers that see all tokens
_FIRST = 2


def first_layers(decoder_layers: int, published: int = _FIRST) -> dict[str, Any]:
    """``prune_before`` of a method whose published K means the first layers, not a depth."""
    quarter = max(1, decoder_layers // 4)
    return {"prune_before": quarter} if quarter < published else {}


def last_steps(
    published: Sequence[int], decoder_layers: int, ranked_before: bool = False
) -> dict[str, Any]:
    """``prune_before`` of a schedule at its relative depth, the last steps of it where there is no
    room for all; {} where the published layers are right.

    Args:
        published: layers before which tokens go.
        decoder_layers: depth of the decoder.
        ranked_before: what keeps its depth is the layer before each, whose attention ranks.
    """
    if decoder_layers >= LEAST_DEPTH:
        return {}
    shift = int(ranked_before)
    steps = [layer - shift for layer in published[-max(1, decoder_layers - 1) :]]
    layers = scaled_layers(steps, decoder_layers, first=1 - shift, last=decoder_layers - 1 - shift)
    return {"prune_before": tuple(layer + shift for layer in layers)}


def scaled_layers(
    layers: Sequence[int],
    depth: int,
    *,
    first: int,
    last: int,
    published: int = PUBLISHED_DEPTH,
) -> tuple[int, ...]:
    """Layer numbers at the same relative depth: rising, all different, inside [first, last].

    Args:
        layers: published numbers, rising.
        depth: layers of the decoder at hand.
        first, last: smallest and largest number that makes sense there.
        published: layers of the decoder that the numbers were published for.

    Raises:
        ValueError: ``[first, last]`` has room for fewer numbers than there are.

    Example::

        >>> scaled_layers((7, 9, 12), 16, first=1, last=15)
        (4, 5, 6)
        >>> scaled_layers((2, 6, 10, 14), 6, first=0, last=4)
        (0, 1, 2, 3)
    """
    if last - first + 1 < len(layers):
        raise ValueError(
            f"a schedule of {len(layers)} layers does not fit a decoder of {depth}: it needs as "
            f"many different layers from {first} to {last}"
        )
    placed: list[int] = []
    for layer in layers:
        at = max(first, (2 * layer * depth + published) // (2 * published))
        placed.append(max(at, placed[-1] + 1) if placed else at)
    limit = last
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - 1
    return tuple(placed)
