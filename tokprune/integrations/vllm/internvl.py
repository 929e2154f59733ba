"""InternVL (2.5, 3, 3.5, in the format of transformers) in vLLM: all tiles of an image stand in one
run; videos keep all their tokens."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import interns1
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokprune.engine.model import ImageLayout
from tokprune.integrations.vllm.processor import Counting
from tokprune.integrations.vllm.projected import PrunedProjected


class InternVLProcessor(Counting, interns1.InternS1MultiModalProcessor):
    per_image = "image_num_patches"

    def layout_of(self, images: Any, number: int, out: Any) -> ImageLayout:
        return self.hosts.tiles(int(out["image"][number]["image_num_patches"].data))


@MULTIMODAL_REGISTRY.register_processor(
    InternVLProcessor,
    info=interns1.InternS1ProcessingInfo,
    dummy_inputs=interns1.InternS1DummyInputsBuilder,
)
class TokpruneInternVLForConditionalGeneration(
    PrunedProjected, interns1.InternS1ForConditionalGeneration
):
    def _process_vision_input(self, image_input: Any) -> Any:
        encode = super()._process_vision_input
        if image_input["type"] != "pixel_values":
            return encode(image_input)
        return self.tiles_left(image_input, encode)
