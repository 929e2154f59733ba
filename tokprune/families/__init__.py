"""Where each model architecture keeps the places that methods act on."""

from tokprune.engine.compat import LEGACY
from tokprune.engine.family import BoundModel, Family
from tokprune.families.refused import REFUSED
from tokprune.families.registry import (
    bind,
    families_with_pieces,
    family_of,
    refuse_models,
    register_family,
    supported_models,
    unwrap,
)

refuse_models(REFUSED)

if not LEGACY:
    from tokprune.families.gemma import Gemma3, Gemma4, PaliGemma
    from tokprune.families.glm4v import Glm4v
    from tokprune.families.llava import Llava
    from tokprune.families.llava_next import LlavaNext
    from tokprune.families.llava_next_video import LlavaNextVideo
    from tokprune.families.llava_onevision import LlavaOnevision
    from tokprune.families.pixtral import Mistral3
    from tokprune.families.qwen_vl import Qwen2VL, Qwen3VL, Qwen25VL, Qwen35
    from tokprune.families.tiled import CohereVision, InternVL, SmolVLM
    from tokprune.families.video_llava import VideoLlava

    for _family in (
        Llava, LlavaNext, LlavaNextVideo, LlavaOnevision, VideoLlava, Qwen2VL, Qwen25VL, Qwen3VL,
        Qwen35, Glm4v, InternVL, SmolVLM, CohereVision, Gemma3, Gemma4, PaliGemma, Mistral3,
    ):  # fmt: skip
        register_family(_family())

__all__ = [
    "BoundModel", "Family", "bind", "families_with_pieces", "family_of", "register_family",
    "supported_models", "unwrap",
]  # fmt: skip
