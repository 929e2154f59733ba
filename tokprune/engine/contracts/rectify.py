"""The option ``rectify``: attention that makes up for the tokens that are gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tokprune.words import with_options

FirstLayer = Literal["uniform", "size"]
Dropped = Literal["nearest", "none"]

#: settings that have a word
WORDS: dict[str, dict[str, Any]] = {
    "size": {},
    "distance": {"size": False, "distance": True},
    "size+distance": {"distance": True},
}


@dataclass(frozen=True)
class Rectify:
    """What is added to the decoder's attention logits once tokens of a prompt were dropped or
    merged: few visual keys attract less attention than all of them did, and rotary positions make
    far keys quieter.

    The size term goes through any attention kernel; the distance term needs "sdpa" or "eager".
    Rows of a batch that lost nothing are left alone.

    Args:
        size: log s, s tokens that a key stands for: those merged into it, by ``dropped``.
        distance: log(c − D), D the mean cosine of the angles between the rotary positions of query
            and key; of every key, text as well.
        first_layer: of tokens reduced before the first decoder layer, s in that layer: "uniform",
            tokens of the image before ÷ after (official code), or "size", as in all others.
        dropped: "nearest", a token that was dropped counts for the kept one of its image that it
            resembles most (ERA); "none", it counts for none (RESTORE without anchors).
        distance_in_decode: the distance term in forwards after the prompt, too (official code: no).
        c: of the distance term, above 1.

    Source: RESTORE, "Improving Visual Token Reduction via Rectifying Distortions", ICML 2026,
    arXiv 2606.01711, and its official code; ERA, arXiv 2606.31982, for ``dropped`` and the form
    that kernels take.
    """

    size: bool = True
    distance: bool = False
    first_layer: FirstLayer = "uniform"
    dropped: Dropped = "nearest"
    distance_in_decode: bool = False
    c: float = 2.0

    def __post_init__(self) -> None:
        for name, choices in (
            ("size", (True, False)), ("distance", (True, False)),
            ("distance_in_decode", (True, False)), ("first_layer", get_args(FirstLayer)),
            ("dropped", get_args(Dropped)),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in choices:
                words = ", ".join(map(repr, choices))
                raise ValueError(f"{name}={value!r} should be one of {words}")
        if isinstance(self.c, bool) or not isinstance(self.c, int | float) or not 1 < self.c < 1e6:
            raise ValueError(f"c={self.c!r} should be a number above 1")
        if not self.size and not self.distance:
            raise ValueError("size or distance should be True; rectify=None rectifies nothing")

    def __repr__(self) -> str:
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }
        return f"Rectify({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    @classmethod
    def of(cls, value: Any) -> Rectify | None:
        """One of the words "size", "distance" and "size+distance", a mapping of options, None, or
        a :class:`Rectify`.

        Raises:
            ValueError: something else, or an option that is not known.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, str) and value in WORDS:
            return cls(**WORDS[value])
        if isinstance(value, Mapping):
            return with_options(cls, value, f"rectify={dict(value)!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        raise ValueError(
            f"rectify={value!r} should be one of {', '.join(map(repr, WORDS))}, None, or a mapping "
            f"with {', '.join(known)}"
        )
