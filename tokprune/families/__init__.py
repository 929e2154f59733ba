"""Where each model architecture keeps the places that methods act on."""

from tokprune.engine.compat import LEGACY
from tokprune.engine.family import BoundModel, Family
from tokprune.families.registry import bind, family_of, register_family, supported_models

if not LEGACY:
    from tokprune.families.llava import Llava
    from tokprune.families.llava_next import LlavaNext
    from tokprune.families.llava_next_video import LlavaNextVideo
    from tokprune.families.llava_onevision import LlavaOnevision

    for _family in (Llava(), LlavaNext(), LlavaNextVideo(), LlavaOnevision()):
        register_family(_family)

__all__ = ["BoundModel", "Family", "bind", "family_of", "register_family", "supported_models"]
