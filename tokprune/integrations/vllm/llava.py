"""LLaVA-1.5 in vLLM: every image is one tile."""

from __future__ import annotations

from vllm.model_executor.models import llava as theirs
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokprune.integrations.vllm.processor import Counting
from tokprune.integrations.vllm.pruned import PrunedLlava


class LlavaProcessor(Counting, theirs.LlavaMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaProcessor, info=theirs.LlavaProcessingInfo, dummy_inputs=theirs.LlavaDummyInputsBuilder
)
class TokpruneLlavaForConditionalGeneration(PrunedLlava, theirs.LlavaForConditionalGeneration):
    pass
