"""GLM-4.1V, 4.5V, 4.6V: images of any size, M-RoPE; frames of videos use the image placeholder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokprune.engine.model import Parts
from tokprune.families.qwen_vl import Qwen2VL


class Glm4v(Qwen2VL):
    """``Glm4vForConditionalGeneration``, ``Glm4vMoe…`` and ``Glm46V…``. The model takes images or
    videos in a forward, never both."""

    name = "glm4v"
    model_classes = (
        "Glm4vForConditionalGeneration",
        "Glm4vMoeForConditionalGeneration",
        "Glm46VForConditionalGeneration",
    )
    broken_videos = True

    def placeholders(self, parts: Parts, call: Mapping[str, Any]) -> Tensor:
        encoded = (call.get("mm_encoder_outputs") or {}).get("video")
        video = call.get(self.video_pixels) is not None or encoded is not None
        return (call["input_ids"] == parts.image_token_id).long() * (2 if video else 1)
