"""Where each model architecture keeps the places that methods act on."""

from tokprune.families.base import Family, Parts, family_of, register_family, supported_models
from tokprune.families.llava import Llava
from tokprune.families.llava_next import LlavaNext

register_family(Llava())
register_family(LlavaNext())

__all__ = ["Family", "Llava", "LlavaNext", "Parts", "family_of", "register_family",
           "supported_models"]  # fmt: skip
