"""What the tiny models of newer families share: their decoders' configs, and how they are made."""

from __future__ import annotations

from typing import Any

import transformers

from tokprune.testing.tiny import decoder_fields, randomise

_CONFIGS = {
    "cohere": "CohereConfig",
    "cohere2": "Cohere2Config",
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "gemma4": "Gemma4TextConfig",
    "glm4": "Glm4Config",
    "granite": "GraniteConfig",
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "phi": "PhiConfig",
    "phi3": "Phi3Config",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "stablelm": "StableLmConfig",
}
#: decoders that take the size of a head from their config alone
_HEAD_DIM = ("gemma", "gemma2", "gemma3", "gemma4", "glm4", "qwen3")


def has_decoder(decoder: str) -> bool:
    """Whether the installed transformers has it."""
    return hasattr(transformers, _CONFIGS[decoder])


def decoder_config(decoder: str, layers: int = 6, **changes: Any) -> Any:
    """Config of a decoder 32 wide with 4 heads of 8, which share 2 key heads."""
    options: dict[str, Any] = {
        **decoder_fields(layers),
        **({"head_dim": 8} if decoder in _HEAD_DIM else {}),
        **changes,
    }
    return getattr(transformers, _CONFIGS[decoder])(**options)


def assemble(kind: str, config: Any, attention: str, seed: int) -> Any:
    """``{kind}ForConditionalGeneration`` of a config with random weights, in eval mode."""
    config._attn_implementation = attention
    return randomise(getattr(transformers, f"{kind}ForConditionalGeneration")(config), seed)
