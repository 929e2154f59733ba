"""Lists of register neurons: pairs of an encoder layer and a channel of its MLP."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from tokprune.files import read_json
from tokprune.methods.options import is_sequence, is_whole

Neurons: TypeAlias = tuple[tuple[int, int], ...]


def read_neurons(neurons: Neurons | str) -> Neurons:
    """The pairs, read where it is a path.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    if not isinstance(neurons, str):
        return neurons
    try:
        value = read_json(Path(neurons))
    except OSError as error:
        raise ValueError(
            f"neurons={neurons!r} should be pairs ((layer, channel), …), or the path of a JSON "
            f"file of them, which could not be read: {error}"
        ) from None
    pairs = tuple(tuple(x) if is_sequence(x) else x for x in value) if is_sequence(value) else value
    _check_pairs(pairs, f"neurons {neurons}: value ")
    return pairs  # type: ignore[no-any-return]


def check_neurons(value: Any, name: str) -> None:
    """Pairs of whole numbers, none twice; or a path.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, str):
        _check_pairs(value, f"{name}=")


def _check_pairs(value: Any, where: str) -> None:
    pairs = isinstance(value, tuple) and all(
        isinstance(x, tuple) and len(x) == 2 and all(is_whole(n) and n >= 0 for n in x)
        for x in value
    )
    if not pairs or len(set(value)) != len(value):
        raise ValueError(
            f"{where}{value!r} should be pairs ((layer, channel), …) of whole numbers from 0 on, "
            "each once"
        )
