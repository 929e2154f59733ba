"""Qwen2-VL and Qwen2.5-VL in vLLM."""

from __future__ import annotations

from vllm.model_executor.models import qwen2_5_vl, qwen2_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokprune.integrations.vllm.pruned_qwen import PrunedQwen, QwenCounting, WithoutEVS


class Qwen2VLProcessor(QwenCounting, qwen2_vl.Qwen2VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor,
    info=qwen2_vl.Qwen2VLProcessingInfo,
    dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder,
)
class TokpruneQwen2VLForConditionalGeneration(PrunedQwen, qwen2_vl.Qwen2VLForConditionalGeneration):
    pass


class Qwen25VLProcessor(QwenCounting, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLProcessor,
    info=qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class TokpruneQwen2_5_VLForConditionalGeneration(
    WithoutEVS, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration
):
    pass
