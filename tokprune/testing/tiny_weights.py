"""What the tiny models of newer families share: their decoders' configs and sane weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

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
    return finish(getattr(transformers, f"{kind}ForConditionalGeneration")(config), seed)


def finish(model: nn.Module, seed: int) -> Any:
    """Random weights as :func:`tokprune.testing.tiny.randomise`, but norms and layer scales near
    the value at which they change nothing: 0 for norms that multiply by 1 + weight, else 1."""
    scales: list[tuple[Tensor, float]] = []
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if "norm" in name and name.endswith("weight"):
            scales.append((p, round(float(p.detach().mean()))))
        elif name.endswith(("lambda_1", "lambda_2", "layer_scalar")):
            scales.append((p, 1.0))
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p, centre in scales:
            p.copy_(centre + 0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()
