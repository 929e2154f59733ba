"""LLaVA-OneVision in vLLM: as LLaVA-NeXT, and large images are shrunk; videos keep all tokens.

vLLM cuts every image into tiles, those of prompts with several images, too."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.model_executor.models import llava_onevision
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokprune.engine.model import ImageLayout
from tokprune.integrations.vllm.processor import Counting
from tokprune.integrations.vllm.pruned import PrunedTiles


class LlavaOnevisionProcessor(Counting, llava_onevision.LlavaOnevisionMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionProcessor,
    info=llava_onevision.LlavaOnevisionProcessingInfo,
    dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
class TokpruneLlavaOnevisionForConditionalGeneration(
    PrunedTiles, llava_onevision.LlavaOnevisionForConditionalGeneration
):
    def pack(self, rows: Tensor, layout: ImageLayout) -> Tensor:
        packed: Tensor = self._merge_image_patch_embeddings(
            torch.tensor(layout.size), rows, image_newline=self.image_newline,
            strategy="spatial_unpad",
        )  # fmt: skip
        return packed
