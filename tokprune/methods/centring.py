"""The option ``centre`` of methods that compare tokens with one another."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tokprune.operators.geometry import centred_geometry

#: "none" compares tokens as they are; "plain" around their mean, "standardised" after dividing
#: every dimension by its standard deviation as well: with the weights of the paper in both
Centre = Literal["none", "plain", "standardised"]


def centred(
    x: Tensor, centre: Centre, candidates: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Features to compare, and the weight of every token (None: 1).

    As published, features around their mean go with weights stretched to [0, 1] (LLaVA's models),
    standardised ones with a sigmoid (Qwen2.5-VL, there of features before its merger; here of those
    that enter the language model).

    Args:
        x: [*, n, d] candidates of one choice, which the mean is of.
        candidates: [*, n] bool, rows that count; None means all.

    Source: "Centering before Pruning", arXiv 2608.30263v1.
    """
    if centre == "none":
        return x, None
    standardise = centre == "standardised"
    norm: Literal["minmax", "sigmoid"] = "sigmoid" if standardise else "minmax"
    found = centred_geometry(x, standardise, norm, candidates)
    return found.centred, found.weight
