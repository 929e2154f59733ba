"""Gemma 3 in vLLM: every image, and every crop of pan-and-scan, is a run of placeholders whose
tokens see each other both ways."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import gemma3_mm
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokprune.engine.model import ImageLayout
from tokprune.errors import UnsupportedModelError
from tokprune.integrations.vllm.processor import Counting
from tokprune.integrations.vllm.projected import PrunedProjected


class Gemma3Processor(Counting, gemma3_mm.Gemma3MultiModalProcessor):
    per_image = "num_patches"


@MULTIMODAL_REGISTRY.register_processor(
    Gemma3Processor,
    info=gemma3_mm.Gemma3ProcessingInfo,
    dummy_inputs=gemma3_mm.Gemma3DummyInputsBuilder,
)
class TokpruneGemma3ForConditionalGeneration(
    PrunedProjected, gemma3_mm.Gemma3ForConditionalGeneration
):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.hosts.own is not None:
            check_attention(self.language_model)

    def runs(self, tiles: int) -> list[ImageLayout]:
        side = self.config.vision_config.image_size
        return [self.hosts.layout(side, side)] * tiles

    def _process_image_input(self, image_input: Any) -> Any:
        return self.tiles_left(image_input, super()._process_image_input)


def check_attention(decoder: Any) -> None:
    """Whether tokens of an image can see each other both ways in a decoder.

    vLLM asks its backends for GPUs, and takes runs of placeholders, of whatever length, for images.

    Raises:
        UnsupportedModelError: in one of its layers they cannot.
    """
    for module in decoder.modules():
        backend = getattr(module, "attn_backend", None)
        if backend is not None and not backend.supports_mm_prefix():
            raise UnsupportedModelError(
                f"tokprune in vLLM: its attention {backend.get_name()} lets a token of an image "
                "see only those before it, where Gemma 3 was trained with all tokens of the image "
                "in view; answers would be those of another model, pruned or not. Serve it on a GPU"
            )
