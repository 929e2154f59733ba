"""Qwen3-VL in vLLM, dense and with experts: features of inner encoder layers (deepstack) stand
beside those of the last one, and text stands between the frames of a video."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen3_vl, qwen3_vl_moe
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokprune.engine.model import ImageLayout
from tokprune.integrations.vllm.host import Left, PlanHost
from tokprune.integrations.vllm.mrope import Media
from tokprune.integrations.vllm.pruned_qwen import QwenCounting, WithoutEVS


class PrunedQwen3(WithoutEVS):
    """Before either model."""

    def reduced(self, host: PlanHost, layout: ImageLayout, features: Tensor) -> Left:
        own, deep = features[:, : self.visual_dim], features[:, self.visual_dim :]
        left = super().reduced(host, layout, own)
        return replace(left, features=torch.cat([left.features, left.follow(deep)], dim=1))

    def media(self, features: Any) -> Iterable[Media]:
        merge = self.config.vision_config.spatial_merge_size
        for own in sorted(features, key=lambda own: own.mm_position.offset):
            at = own.mm_position
            _, height, width = own.data[f"{own.modality}_grid_thw"].data.tolist()
            grid = (1, height // merge, width // merge)
            if own.modality == "image":
                yield at.offset, at.length, True, grid, 1.0
                continue
            tokens = grid[1] * grid[2]
            for first in at.is_embed.nonzero()[::tokens, 0].tolist():
                yield at.offset + first, tokens, False, grid, 1.0


class Qwen3VLProcessor(QwenCounting, qwen3_vl.Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor,
    info=qwen3_vl.Qwen3VLProcessingInfo,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class TokpruneQwen3VLForConditionalGeneration(
    PrunedQwen3, qwen3_vl.Qwen3VLForConditionalGeneration
):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor,
    info=qwen3_vl_moe.Qwen3VLMoeProcessingInfo,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class TokpruneQwen3VLMoeForConditionalGeneration(
    PrunedQwen3, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration
):
    pass
