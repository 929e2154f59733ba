"""LLaVA-NeXT in vLLM: a base tile, and crops that are stitched."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.model_executor.models import llava, llava_next
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokprune.engine.model import ImageLayout
from tokprune.integrations.vllm.processor import Counting
from tokprune.integrations.vllm.pruned import PrunedTiles


class LlavaNextProcessor(Counting, llava_next.LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor,
    info=llava_next.LlavaNextProcessingInfo,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class TokpruneLlavaNextForConditionalGeneration(
    PrunedTiles, llava_next.LlavaNextForConditionalGeneration
):
    def pack(self, rows: Tensor, layout: ImageLayout) -> Tensor:
        size = torch.tensor(layout.size)
        packed: Tensor = self._merge_image_patch_embeddings(size, rows, strategy="spatial_unpad")
        return packed
