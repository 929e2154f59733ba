"""Which layers of an encoder MSDG-Prune looks at, and which coordinate marks its sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokprune.engine.contracts import ModelFacts
from tokprune.errors import UnsupportedModelError
from tokprune.methods.options import is_number, is_sequence, is_whole

if TYPE_CHECKING:
    from tokprune.methods.msdg import MSDG

#: (early, late, start, end), layers whose inputs are looked at
Layers = tuple[int, int, int, int]
#: (layer, coordinate, threshold)
Sink = tuple[int, int, float]

#: depth of the tower, and layers
_CLIP, _MERGED = (24, (2, 23, 14, 19)), (32, (2, 31, 19, 24))


def check_layers(value: Any, name: str) -> None:
    fine = is_sequence(value) and len(value) == 4 and all(is_whole(x) and x >= 1 for x in value)
    if not fine or value[0] >= value[1] or value[2] >= value[3]:
        raise ValueError(
            f"{name}={value!r} should be (early, late, start, end), encoder layers from 1 on with "
            "early < late and start < end"
        )


def check_sink(value: Any, name: str) -> None:
    fine = is_sequence(value) and len(value) == 3 and all(is_whole(x) and x >= 0 for x in value[:2])
    if not fine or not is_number(value[2]) or value[2] < 0:
        raise ValueError(
            f"{name}={value!r} should be (layer, coordinate, threshold), whole numbers and a limit "
            "of at least 0"
        )


def encoder_layers(method: MSDG, facts: ModelFacts) -> tuple[Layers, bool]:
    """The layers of a model's encoder, and whether it packs its images.

    Raises:
        ValueError: an option names a layer that is not there.
        UnsupportedModelError: no stage can read the encoder's states, or there are too few.
    """
    tower = facts.observed if facts.tower is None and facts.readable else None
    packs = tower is not None
    tower = tower or facts.need_tower(method.name)
    depth, feature = tower.encoder_layers, tower.feature_layer
    for name, value, most in (
        ("layers", method.layers and max(method.layers), depth),
        ("sink", method.sink and method.sink[0], depth - 1),
    ):
        if value is not None and value > most:
            raise ValueError(
                f"{name}={getattr(method, name)!r} should name encoder layers up to {most}: this "
                f"model's vision encoder has {depth}"
            )
    if method.layers is not None:
        early, late, start, end = method.layers
        return (early, late, start, end), packs
    # states behind the layer that the model reads are of no use to it
    last = depth if feature is None or feature < 0 else feature + 1
    if last < 2:
        raise UnsupportedModelError(
            f"{method.name} compares the states of several encoder layers, and this model reads "
            f"layer {last - 1} of its vision encoder"
        )
    published, layers = _MERGED if tower.merges > 1 else _CLIP
    early, late, start, end = (round(layer * depth / published) for layer in layers)
    late, end = (min(max(layer, 2), last) for layer in (late, end))
    return (min(max(early, 1), late - 1), late, min(max(start, 1), end - 1), end), packs
