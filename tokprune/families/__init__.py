"""Where each model architecture keeps the places that methods act on."""

from tokprune.engine.compat import OLD
from tokprune.families.base import (
    Family,
    Parts,
    family_of,
    refuse_model,
    register_family,
    supported_models,
)
from tokprune.families.llava_original import REFUSED, LlavaOriginal

if OLD:
    register_family(LlavaOriginal())
    for name, reason in REFUSED.items():
        refuse_model(name, reason)
else:
    from tokprune.families.llava import Llava
    from tokprune.families.llava_next import LlavaNext
    from tokprune.families.llava_next_video import LlavaNextVideo
    from tokprune.families.llava_onevision import LlavaOnevision

    register_family(Llava())
    register_family(LlavaNext())
    register_family(LlavaNextVideo())
    register_family(LlavaOnevision())
    for name in LlavaOriginal.model_classes:
        refuse_model(
            name,
            "classes of the original llava package run on transformers 4.37; patch them there, or "
            "use a checkpoint of transformers' own LLaVA classes here",
        )

__all__ = ["Family", "Parts", "family_of", "refuse_model", "register_family", "supported_models"]
