"""A model with everything that its tokens and MACs are counted from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokprune.engine.stages import ModelFacts
from tokprune.families import family_of
from tokprune.families.base import Family, Parts
from tokprune.flops import ModelShape


@dataclass(frozen=True)
class Known:
    """A model, its family, the parts that are hooked, its tower's and decoder's facts and widths.

    Raises:
        UnsupportedModelError: (:meth:`of`) the model is not of a supported class.
    """

    model: Any
    family: Family
    parts: Parts
    facts: ModelFacts
    shape: ModelShape

    @classmethod
    def of(cls, model: Any) -> Known:
        family = family_of(model)
        parts = family.parts(model)
        return cls(model, family, parts, family.facts(model, parts), ModelShape.of(model, parts))
