"""The engine around a model: options that do not go with ours, and what it says of itself."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from tokprune import __version__
from tokprune.errors import UnsupportedModelError
from tokprune.integrations.vllm.hosts import Hosts

logger = init_logger("vllm.tokprune")


def check_engine(vllm_config: Any, hosts: Hosts) -> None:
    """Options of the engine.

    Raises:
        UnsupportedModelError: one of them does not go with pruning; names it.
    """
    if hosts.own is None:
        return
    compilation, lora = vllm_config.compilation_config, vllm_config.lora_config
    speculative = vllm_config.speculative_config
    refused = {
        "compile_mm_encoder": (
            bool(hosts.own.plan.encoder) and getattr(compilation, "compile_mm_encoder", False)
        ),
        "cudagraph_mm_encoder": getattr(compilation, "cudagraph_mm_encoder", False),
        "enable_tower_connector_lora": getattr(lora, "enable_tower_connector_lora", False),
        f"speculative decoding by {getattr(speculative, 'method', '')!r}": (
            speculative is not None and speculative.method != "ngram"
        ),
        "video_pruning_rate": hosts.bound.facts.axes > 1 and bool(
            getattr(vllm_config.model_config.multimodal_config, "video_pruning_rate", None)
        ),
    }  # fmt: skip
    for name, given in refused.items():
        if given:
            raise UnsupportedModelError(
                f"tokprune in vLLM: {name} does not go with pruning; leave it out"
            )


def images_at_once(vllm_config: Any, hosts: Hosts) -> int:
    """Images that the vision encoder runs at a time. The scheduler counts what is left of them, and
    would let far more of them through at once than it does without pruning."""
    step = vllm_config.scheduler_config.max_num_batched_tokens
    return max(1, step // max(1, hosts.bound.facts.max_visual_tokens))


def say(hosts: Hosts) -> None:
    """One line about what is pruned to what."""
    if hosts.own is None:
        logger.info("tokprune %s: switched off, images keep all their tokens", __version__)
        return
    told = "; ".join(
        f"{hosts.own.count(layout)} of the {layout.count} tokens of an image of {words}"
        for words, layout in hosts.examples()
    )
    logger.info("tokprune %s: %r leaves %s", __version__, hosts.own.method, told)
