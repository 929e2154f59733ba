"""Models of published shapes with random weights, from config alone: speed needs no training.

LLaVA's shapes are here, those of newer families in :mod:`tokprune.bench.released`. Every width,
depth and head count is that of the released checkpoint, so tokens, FLOPs, KV bytes and
times are those of the real model; answers are noise. The weights are scaled so that patches go on
resembling their image from layer to layer, or adaptive methods would see nothing but noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokprune.bench.prompts import default_image
from tokprune.bench.released import RELEASED, VIDEOS, Released
from tokprune.errors import did_you_mean

if TYPE_CHECKING:
    from PIL import Image

#: room for activations, caches and libraries beside the weights, at least
HEADROOM = 1 << 30


@dataclass(frozen=True)
class Shape:
    """A LLaVA's sizes. ``tiled``: LLaVA-NeXT with its published tile grids."""

    vision_layers: int
    vision_width: int
    vision_mlp: int
    vision_heads: int
    text_layers: int
    text_width: int
    text_mlp: int
    text_heads: int
    key_heads: int
    vocabulary: int = 32064
    positions: int = 4096
    tiled: bool = False
    source: str = ""


def _clip_large(**text: Any) -> Shape:
    """CLIP ViT-L/14 at 336 pixels before a Vicuna."""
    return Shape(24, 1024, 4096, 16, **text)


_VICUNA_7B = {
    "text_layers": 32, "text_width": 4096, "text_mlp": 11008, "text_heads": 32, "key_heads": 32,
}  # fmt: skip
_VICUNA_13B = {
    "text_layers": 40, "text_width": 5120, "text_mlp": 13824, "text_heads": 40, "key_heads": 40,
}  # fmt: skip

PRESETS: dict[str, Shape | Released] = {
    "tiny": Shape(
        12, 64, 192, 4, 16, 96, 224, 6, 3, vocabulary=256, source="LLaVA-1.5 of 2 M parameters"
    ),
    "small": Shape(
        12, 384, 1536, 6, 8, 384, 1024, 6, 6, vocabulary=256, source="LLaVA-1.5 of 36 M parameters"
    ),
    "llava-1.5-7b": _clip_large(**_VICUNA_7B, source="llava-hf/llava-1.5-7b-hf"),
    "llava-1.5-13b": _clip_large(**_VICUNA_13B, source="llava-hf/llava-1.5-13b-hf"),
    "llava-next-7b": _clip_large(
        **_VICUNA_7B, tiled=True, source="llava-hf/llava-v1.6-vicuna-7b-hf"
    ),
    **RELEASED,
    **VIDEOS,
}

SIDE, PATCH = 336, 14
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def shape_of(name: str) -> Shape | Released:
    """A preset by name.

    Raises:
        ValueError: unknown name; lists those there are.
    """
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS)
        raise ValueError(
            f"random weights {name!r}: unknown shape; known: {', '.join(PRESETS)}.{hint}"
        )
    return PRESETS[name]


def image_of(name: str) -> Image.Image | None:
    """The image that a preset is measured with; None: of any size, which the model changes."""
    shape = shape_of(name)
    return default_image(shape.size) if isinstance(shape, Released) else None


def frames_of(name: str) -> int:
    """Frames of the video that a preset is measured with; 0: an image."""
    shape = shape_of(name)
    return shape.frames if isinstance(shape, Released) else 0


def config_of(shape: Shape | Released, attention: str = "sdpa") -> Any:
    """A config of transformers. The last token of a LLaVA's vocabulary is the image's."""
    config = shape.config() if isinstance(shape, Released) else _llava(shape)
    config._attn_implementation = attention
    return config


def _llava(shape: Shape) -> Any:
    """A ``LlavaConfig`` or ``LlavaNextConfig``."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=shape.vision_mlp,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=768 if shape.vision_width == 1024 else shape.vision_width,
    )
    text = LlamaConfig(
        hidden_size=shape.text_width,
        intermediate_size=shape.text_mlp,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    common: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": shape.vocabulary - 1,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_seq_length": (SIDE // PATCH) ** 2,
    }
    if shape.tiled:
        return LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **common)
    return LlavaConfig(**common)


def skeleton(shape: str | Shape | Released) -> Any:
    """The model of a preset, or of a shape of your own, on the meta device, without memory behind
    its weights."""
    shape = shape_of(shape) if isinstance(shape, str) else shape
    with torch.device("meta"):
        return _class_of(shape)(config_of(shape))


def parameters_of(shape: Shape | Released) -> int:
    """Number of weights; nothing is allocated."""
    return sum(p.numel() for p in skeleton(shape).parameters())


def random_model(
    shape: str | Shape | Released,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
    seed: int = 0,
) -> Any:
    """A model of a preset's shape in evaluation mode, made on ``device`` in ``dtype`` at once.

    Args:
        shape: a key of :data:`PRESETS`, or a shape of your own.
        dtype: of all weights.
        device: where they are made; no copy exists anywhere else.
        attention: attention backend, "eager" or "sdpa" ("flash_attention_2" on CUDA).
        seed: of the weights.

    Raises:
        ValueError: unknown name, or an attention backend that transformers refuses.
        MemoryError: weights and headroom need more than is free on ``device``; says how much.
    """
    name = shape if isinstance(shape, str) else "of a given shape"
    shape, device = shape_of(shape) if isinstance(shape, str) else shape, torch.device(device)
    check_memory(name, shape, dtype, device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, _NoRandom():
            model = _class_of(shape)(config_of(shape, attention))
    finally:
        torch.set_default_dtype(before)
    _randomise(model, seed)
    return model.eval()


def check_memory(
    name: str, shape: Shape | Released, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse what does not fit.

    Raises:
        MemoryError: names the need, what is free, and what would be smaller.
    """
    free = free_memory(device)
    weights = parameters_of(shape) * dtype.itemsize
    # a small model needs little room beside it
    need = weights + min(HEADROOM, max(weights, 1 << 27))
    if free is not None and need > free:
        smaller = "" if dtype.itemsize <= 2 else " --dtype bfloat16 halves it;"
        kind = "GPU memory" if device.type == "cuda" else "memory"
        raise MemoryError(
            f"random weights {name!r} in {str(dtype).removeprefix('torch.')} need "
            f"{need / 1e9:.1f} GB of {kind} ({weights / 1e9:.1f} GB of weights and room to work); "
            f"{free / 1e9:.1f} GB are free.{smaller} the smallest shape is 'tiny'"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    return None


def _class_of(shape: Shape | Released) -> Any:
    import transformers

    if isinstance(shape, Released):
        return getattr(transformers, f"{shape.kind}ForConditionalGeneration")
    return (
        transformers.LlavaNextForConditionalGeneration
        if shape.tiled
        else transformers.LlavaForConditionalGeneration
    )


class _NoRandom(TorchFunctionMode):
    """Skips the random initialisation of modules under construction: all of it is overwritten, and
    for 7 billion weights it takes minutes."""

    _random = frozenset({Tensor.normal_, Tensor.uniform_, Tensor.random_})

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._random:
            return args[0]
        return func(*args, **(kwargs or {}))


def _randomise(model: nn.Module, seed: int) -> None:
    """Weights with unit gain; what blocks add to the residual stream stays smaller than it."""
    generators: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.device not in generators:
                generators[p.device] = torch.Generator(p.device).manual_seed(seed)
            mean, scale = _scale(name, p)
            p.normal_(mean, scale, generator=generators[p.device])


def _scale(name: str, p: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a weight."""
    if "position_embedding" in name or "pos_embed" in name:
        return 0.0, 0.08
    if (
        "class_embedding" in name
        or "cls_token" in name
        or "embed_tokens" in name
        or "newline" in name
    ):
        return 0.0, 0.5
    if p.dim() >= 2:
        gain = 1.0
        if any(part in name for part in _TO_RESIDUAL):
            gain = 0.3
        elif "q_proj" in name:
            gain = 1.7
        return 0.0, gain / math.sqrt(p[0].numel())
    if "norm" in name or "layrnorm" in name:
        # modules that multiply by 1 + weight are made with zeros
        return (1.0 if bool(p[0]) else 0.0, 0.1) if name.endswith("weight") else (0.0, 0.05)
    return 0.0, 0.05


_TO_RESIDUAL = ("out_proj", "o_proj", "fc2", "down_proj", "attn.proj", "projection_layer")
