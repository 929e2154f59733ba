"""Tiny random models of every family, built in code: no downloads, seconds on a CPU.

A tower of 6 layers on 6 × 6 patches and a decoder of 8 layers, both 32 wide. The weights are random
but not so small that every token looks alike, so that scores have something to rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor, nn

from tokprune.families import bind
from tokprune.testing.prompts import make_inputs, take_row

IMAGE_TOKEN = 99
VIDEO_TOKEN = 98
VOCAB = 100
#: patches along each side of a tile
GRID = 6
PATCHES = GRID * GRID
#: pixels along each side of a tile
IMAGE_SIZE = 24

_TEXT_CONFIGS = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config"}

Builder: TypeAlias = "Callable[..., Any]"
Inputs: TypeAlias = "dict[str, Tensor]"


def decoder_fields(layers: int, width: int = 32, inner: int = 48) -> dict[str, Any]:
    """Fields that the text configs of all tiny models share: 4 heads, which share 2 key heads."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }


def text_config(decoder: str = "llama", layers: int = 8, **changes: Any) -> Any:
    """Config of a decoder, ``"llama"``, ``"mistral"`` or ``"qwen2"``; ``changes``: its fields."""
    options: dict[str, Any] = {
        **decoder_fields(layers),
        "initializer_range": 0.3,
        **({"sliding_window": None} if decoder == "mistral" else {}),
        **changes,
    }
    return getattr(transformers, _TEXT_CONFIGS[decoder])(**options)


def vision_config(tower: str = "clip", layers: int = 6, **changes: Any) -> Any:
    """Config of a tower, ``"clip"`` (with a class token) or ``"siglip"`` (without)."""
    options: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": IMAGE_SIZE // GRID,
        **changes,
    }
    if tower == "clip":
        return transformers.CLIPVisionConfig(projection_dim=32, **options)
    return transformers.SiglipVisionConfig(vision_use_head=False, **options)


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Give a model random weights of a useful size, the same for the same seed; in eval mode.

    What scales stays near the value at which it changes nothing: norms near that of a new model (0
    where they multiply by 1 + weight, else 1), layer scales near 1. The decay of linear attention
    reaches back over many tokens."""
    generator = torch.Generator().manual_seed(seed)
    centres = {
        id(p): round(float(p.detach().mean()))
        for module in model.modules()
        if "Norm" in type(module).__name__
        for name, p in module.named_parameters(recurse=False)
        if name == "weight"
    }
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if id(p) in centres:
                p.copy_(centres[id(p)] + 0.1 * noise)
            elif p.dim() >= 2:
                scale = 0.5 if "embed" in name else 1.0 / p.shape[-1] ** 0.5
                p.copy_(noise * scale * (1.5 if "_proj" in name else 1.0))
            elif name.endswith(("lambda_1", "lambda_2")):
                p.copy_(1 + 0.1 * noise)
            elif name.endswith("A_log"):
                p.copy_(torch.log(0.02 + 0.5 * torch.rand(p.shape, generator=generator)))
            else:
                p.copy_(0.1 * noise)
        for name, b in model.named_buffers():
            if name.endswith("layer_scalar"):
                b.copy_(1 + 0.1 * torch.randn(b.shape, generator=generator))
    return model.eval()


def _build(
    kind: str, tower: str, decoder: str, attention: str, seed: int, layers: int,
    vision_layers: int, text: dict[str, Any], **options: Any,
) -> Any:  # fmt: skip
    """A model of transformers' ``{kind}Config`` and ``{kind}ForConditionalGeneration``."""
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision_config(tower, vision_layers),
        text_config=text_config(decoder, layers, **text),
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        **{"vision_feature_layer": -2, **options},
    )
    config._attn_implementation = attention
    return randomise(getattr(transformers, f"{kind}ForConditionalGeneration")(config), seed)


def _tilings() -> list[list[int]]:
    """(height, width) of the canvases that a tiled image may be fitted to."""
    s = IMAGE_SIZE
    return [[s, 2 * s], [2 * s, s], [2 * s, 2 * s], [3 * s, s], [s, 3 * s]]


def llava(
    tower: str = "clip", decoder: str = "llama", attention: str = "sdpa", seed: int = 0,
    layers: int = 8, vision_layers: int = 6, **changes: Any,
) -> Any:  # fmt: skip
    """LLaVA-1.5: one tile an image. ``attention``: "eager", "sdpa"; ``changes``: of the decoder's
    config (so for all builders here)."""
    return _build(
        "Llava", tower, decoder, attention, seed, layers, vision_layers, changes,
        image_token_id=IMAGE_TOKEN,
    )  # fmt: skip


def llava_next(
    tower: str = "clip", decoder: str = "llama", attention: str = "sdpa", seed: int = 0,
    layers: int = 8, vision_layers: int = 6, **changes: Any,
) -> Any:  # fmt: skip
    """LLaVA-NeXT: a base tile and up to four crops, a newline per row of the stitched crops."""
    return _build(
        "LlavaNext", tower, decoder, attention, seed, layers, vision_layers, changes,
        image_token_id=IMAGE_TOKEN, image_grid_pinpoints=_tilings(),
    )  # fmt: skip


def llava_next_video(
    tower: str = "clip", decoder: str = "llama", attention: str = "sdpa", seed: int = 0,
    layers: int = 8, vision_layers: int = 6, pooling: str = "average", **changes: Any,
) -> Any:  # fmt: skip
    """LLaVA-NeXT-Video: LLaVA-NeXT for images; frames of 3 × 3 cells. ``pooling``: "average",
    "max", "conv"."""
    return _build(
        "LlavaNextVideo", tower, decoder, attention, seed, layers, vision_layers, changes,
        image_token_index=IMAGE_TOKEN, video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=_tilings(), spatial_pool_mode=pooling, spatial_pool_out_channels=32,
    )  # fmt: skip


def llava_onevision(
    tower: str = "siglip", decoder: str = "qwen2", attention: str = "sdpa", seed: int = 0,
    layers: int = 8, vision_layers: int = 6, most: int = 9, feature_layer: int = -1, **changes: Any,
) -> Any:  # fmt: skip
    """LLaVA-OneVision. ``most``: tiles' worth of cells beyond which the stitched crops are
    interpolated; ``feature_layer`` as ``vision_feature_layer`` in the config."""
    return _build(
        "LlavaOnevision", tower, decoder, attention, seed, layers, vision_layers, changes,
        image_token_index=IMAGE_TOKEN, video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=_tilings(), vision_feature_layer=feature_layer,
        vision_aspect_ratio=f"anyres_max_{most}",
    )  # fmt: skip


# ------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class TinyFamily:
    """How the checks get tiny models of a family, and prompts for them."""

    #: :attr:`tokprune.engine.family.Family.name`
    name: str
    #: ``build(attention="eager")`` gives a model in eval mode, the same weights every time
    build: Builder
    #: as :func:`tokprune.testing.make_inputs`
    inputs: Callable[..., Inputs] = make_inputs
    #: as :func:`tokprune.testing.take_row`
    row: Callable[..., Inputs] = take_row
    #: share of the largest logit by which logits of equal computations may differ
    tolerance: float = 1e-5
    #: whether prompts may hold several images, videos, and images beside videos
    several: bool = True
    videos: bool = False
    mixed: bool = True
    #: attention backends that the models have beside flash attention
    backends: tuple[str, ...] = ("eager", "sdpa")
    #: (height, width) of images of different grids; None: any will do
    sizes: tuple[tuple[int, int], ...] | None = None


_TINY: dict[str, TinyFamily] = {}


def register_tiny(
    name: str,
    build: Builder,
    inputs: Callable[..., Inputs] = make_inputs,
    row: Callable[..., Inputs] = take_row,
    **options: Any,
) -> TinyFamily:
    """Make the tiny model of a family known to :func:`tokprune.testing.check_method`.

    Args:
        name: the family's name; a later registration of the same name wins.
        build: gives a model in eval mode, a new one with the same weights at every call; takes
            ``attention="eager"`` or ``"sdpa"``.
        inputs: makes the inputs of a batch of prompts, as :func:`tokprune.testing.make_inputs`
            does; that one is right for models that take ``pixel_values`` of square tiles.
        row: takes one row out of such a batch, as :func:`tokprune.testing.take_row` does.
        options: more fields of :class:`TinyFamily`: what the prompts may hold, ``tolerance``.

    Raises:
        TypeError: ``build`` cannot be called.
    """
    if not callable(build):
        raise TypeError(f"build={build!r} should be a function that builds a tiny model")
    _TINY[name] = TinyFamily(name, build, inputs, row, **options)
    return _TINY[name]


def tiny_families() -> dict[str, TinyFamily]:
    """All that are registered, by name of the family."""
    return dict(_TINY)


def tiny_family(family: str | TinyFamily | Builder) -> TinyFamily:
    """A registered one by name, a builder of models under the name of its family, or as it is.

    Raises:
        ValueError: no tiny model is registered under this name (lists the names).
    """
    if isinstance(family, TinyFamily):
        return family
    if isinstance(family, str):
        if family not in _TINY:
            raise ValueError(
                f"family={family!r} has no tiny model; there are {', '.join(sorted(_TINY))}. Add "
                "one with tokprune.testing.register_tiny(name, build)"
            )
        return _TINY[family]
    from tokprune.testing.families import made_by  # which imports this module

    if (known := made_by(family, list(_TINY.values()))) is not None:
        return known
    name = bind(family()).family.name
    known = _TINY.get(name)
    return replace(known, build=family) if known else TinyFamily(name, family)
