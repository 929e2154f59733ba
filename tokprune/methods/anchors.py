"""The option ``anchors``: a part of the budget goes to tokens that others are merged into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from torch import Tensor

from tokprune.engine.contracts import ImageTokens, Selection
from tokprune.operators.anchors import Place, Superior, distinctive_anchors
from tokprune.words import with_options


@dataclass(frozen=True)
class Anchors:
    """Of an image's budget n the method itself chooses n − ⌈share · n⌉ tokens; of all others those
    that stand for many become anchors, and every one left is merged into the anchor that it
    resembles most.

    Args:
        share: of the budget that goes to anchors, above 0; 1 merges only. RESTORE halves it.
        superior: the tokens that an anchor should not resemble: "lower", those that stand for fewer
            others (official code); "higher", for more (the paper's equation 6).
        place: where a merged token stands: at the "first", the (lower) "median" or the "last" of
            its tokens, in prompt order.

    Source: RESTORE, "Improving Visual Token Reduction via Rectifying Distortions", ICML 2026,
    arXiv 2606.01711; there with ``positions="preserve"`` and ``rectify="size+distance"``.
    """

    share: float = 0.5
    superior: Superior = "lower"
    place: Place = "median"

    def __post_init__(self) -> None:
        share = self.share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"share={share!r} should be a number in (0, 1]")
        for name, words in (("superior", Superior), ("place", Place)):
            if getattr(self, name) not in get_args(words):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} should be one of "
                    + ", ".join(map(repr, get_args(words)))
                )

    def __repr__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)
        return f"Anchors({options})"

    @classmethod
    def of(cls, value: Any) -> Anchors | None:
        """A share of the budget, a mapping of options, None, or :class:`Anchors`.

        Raises:
            ValueError: something else, or an option that is not known.
        """
        if value is None or isinstance(value, cls):
            return value
        options = {"share": value} if isinstance(value, int | float) else value
        if isinstance(options, Mapping):
            given = value if options is not value else dict(value)
            return with_options(cls, options, f"anchors={given!r}")
        raise ValueError(
            f"anchors={value!r} should be a share of the budget in (0, 1], None, or a mapping with "
            + ", ".join(f.name for f in fields(cls))
        )

    def chosen(self, budget: int) -> int:
        """Tokens that the method itself chooses."""
        return int((1 - self.share) * budget)

    def merged(self, image: ImageTokens, chosen: Tensor, number: int, newlines: bool) -> Selection:
        """The selection of the rows ``chosen`` [k] and ``number`` anchors of all others.
        ``newlines``: whether newline tokens are merged, too; else they go."""
        x, k = image.features, chosen.shape[0]
        taken = torch.zeros_like(image.newline) if newlines else image.newline
        taken = taken.scatter(0, chosen, torch.ones_like(chosen, dtype=torch.bool))
        count = (image.count if newlines else image.patches) - k
        rest = taken.to(torch.int8).sort(stable=True).indices[:count]
        own = distinctive_anchors(x[rest], min(number, count), self.superior)
        index = torch.cat([chosen, rest[own.place(self.place)]])
        features = torch.cat([x[chosen], own.merged.to(x.dtype)])
        order = index.argsort(stable=True)
        to = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
        group = torch.full((image.count,), -1, device=x.device)
        group[chosen], group[rest] = to[:k], to[k + own.cluster]
        return Selection(index[order], features[order], group)
