"""Tiny random LLaVA models, built in code: no downloads, seconds on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

IMAGE_TOKEN = 99
VIDEO_TOKEN = 98
VOCAB = 100
GRID = 6
PATCHES = GRID * GRID
IMAGE_SIZE = 24
TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def text_config(decoder: str = "llama", layers: int = 8, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        **({"sliding_window": None} if decoder == "mistral" else {}),
        **changes,
    }
    return TEXT_CONFIGS[decoder](**options)


def vision_config(tower: str = "clip", layers: int = 6, **changes: Any) -> Any:
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
        return CLIPVisionConfig(projection_dim=32, **options)
    return SiglipVisionConfig(vision_use_head=False, **options)


def _randomise(model: torch.nn.Module, seed: int) -> Any:
    """Random weights that are not so small that every token looks alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() >= 2:
                scale = 0.5 if "embed" in name else 1.0 / p.shape[-1] ** 0.5
                p.copy_(noise * scale * (1.5 if "_proj" in name else 1.0))
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(0.1 * noise)
    return model.eval()


def llava(
    tower: str = "clip", decoder: str = "llama", attention: str = "sdpa", seed: int = 0,
    layers: int = 8, vision_layers: int = 6, **changes: Any,
) -> LlavaForConditionalGeneration:  # fmt: skip
    config = LlavaConfig(
        vision_config=vision_config(tower, vision_layers),
        text_config=text_config(decoder, layers, **changes),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    config._attn_implementation = attention
    return _randomise(LlavaForConditionalGeneration(config), seed)


def llava_next(
    tower: str = "clip", decoder: str = "llama", attention: str = "sdpa", seed: int = 0,
    layers: int = 8, vision_layers: int = 6, **changes: Any,
) -> LlavaNextForConditionalGeneration:  # fmt: skip
    s = IMAGE_SIZE
    config = LlavaNextConfig(
        vision_config=vision_config(tower, vision_layers),
        text_config=text_config(decoder, layers, **changes),
        image_token_id=IMAGE_TOKEN,
        image_grid_pinpoints=[[s, 2 * s], [2 * s, s], [2 * s, 2 * s], [3 * s, s], [s, 3 * s]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    config._attn_implementation = attention
    return _randomise(LlavaNextForConditionalGeneration(config), seed)


def llava_next_video(
    tower: str = "clip", decoder: str = "llama", attention: str = "sdpa", seed: int = 0,
    layers: int = 8, vision_layers: int = 6, pooling: str = "average", **changes: Any,
) -> LlavaNextVideoForConditionalGeneration:  # fmt: skip
    s = IMAGE_SIZE
    config = LlavaNextVideoConfig(
        vision_config=vision_config(tower, vision_layers),
        text_config=text_config(decoder, layers, **changes),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=[[s, 2 * s], [2 * s, s], [2 * s, 2 * s], [3 * s, s], [s, 3 * s]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        spatial_pool_mode=pooling,
        spatial_pool_out_channels=32,
    )
    config._attn_implementation = attention
    return _randomise(LlavaNextVideoForConditionalGeneration(config), seed)


def llava_onevision(
    tower: str = "siglip", decoder: str = "qwen2", attention: str = "sdpa", seed: int = 0,
    layers: int = 8, vision_layers: int = 6, most: int = 9, feature_layer: int = -1, **changes: Any,
) -> LlavaOnevisionForConditionalGeneration:  # fmt: skip
    """``most``: tiles' worth of cells beyond which the stitched crops are interpolated."""
    s = IMAGE_SIZE
    config = LlavaOnevisionConfig(
        vision_config=vision_config(tower, vision_layers),
        text_config=text_config(decoder, layers, **changes),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=[[s, 2 * s], [2 * s, s], [2 * s, 2 * s], [3 * s, s], [s, 3 * s]],
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        vision_aspect_ratio=f"anyres_max_{most}",
    )
    config._attn_implementation = attention
    return _randomise(LlavaOnevisionForConditionalGeneration(config), seed)


BUILDERS = {"llava": llava, "llava_next": llava_next}
VIDEO_BUILDERS = {"llava_next_video": llava_next_video, "llava_onevision": llava_onevision}


def tokens_of(model: Any, size: tuple[int, int] | None = None, alone: bool = True) -> int:
    """Prompt tokens the model makes of one image of ``size`` (height, width); ``alone``: it is
    the only one of its prompt."""
    from tokprune.families import family_of

    family = family_of(model)
    parts = family.parts(model)
    layouts = family.layouts(
        parts, torch.zeros(1, 3, 1, 1), [size] if size else None, family.facts(model, parts),
        [1] if alone else [2],
    )  # fmt: skip
    return len(layouts[0].packed)


def video_tokens_of(model: Any, frames: int) -> int:
    """Prompt tokens the model makes of a video."""
    cells = (GRID // 2) ** 2 * frames
    return cells + ("Onevision" in type(model).__name__)


def make_inputs(
    model: Any, prompts: list[list[Any]], sizes: list[tuple[int, int]] | None = None,
    seed: int = 1, pad_side: str = "left", frames: int = 4,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Batch of prompts. A prompt lists text lengths, ``"image"`` and ``"video"`` entries, for
    example ``[4, "image", 6]``; ``sizes``: (height, width) per image (LLaVA-NeXT); ``frames`` of
    every video, each the frame before with some of its patches drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    tiled = hasattr(model.config, "image_grid_pinpoints")
    whole = "Onevision" in type(model).__name__  # several images of a prompt are not tiled
    images = sum(part == "image" for prompt in prompts for part in prompt)
    videos = sum(part == "video" for prompt in prompts for part in prompt)
    if tiled:
        sizes = sizes or [(20, 40)] * images
    rows, image, alone = [], 0, []
    for prompt in prompts:
        ids: list[int] = []
        for part in prompt:
            if part == "image":
                size = sizes[image] if tiled and sizes else None
                alone.append(not whole or prompt.count("image") == 1)
                ids += [IMAGE_TOKEN] * tokens_of(model, size, alone[-1])
                image += 1
            elif part == "video":
                ids += [VIDEO_TOKEN] * video_tokens_of(model, frames)
            else:
                ids += torch.randint(3, 98, (part,), generator=generator).tolist()
        rows.append(ids)
    longest = max(map(len, rows))
    padded, mask = [], []
    for ids in rows:
        gap = longest - len(ids)
        if pad_side == "left":
            padded.append([0] * gap + ids)
            mask.append([0] * gap + [1] * len(ids))
        else:
            padded.append(ids + [0] * gap)
            mask.append([1] * len(ids) + [0] * gap)
    inputs: dict[str, torch.Tensor] = {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor(mask),
    }
    if images:
        if tiled:
            assert sizes is not None
            from transformers.models.llava_next.modeling_llava_next import (
                image_size_to_num_patches,
            )

            tiles = [
                image_size_to_num_patches(list(s), model.config.image_grid_pinpoints, IMAGE_SIZE)
                if one
                else 1
                for s, one in zip(sizes, alone)
            ]
            pixels = torch.zeros(images, max(tiles), 3, IMAGE_SIZE, IMAGE_SIZE)
            for i, n in enumerate(tiles):
                pixels[i, :n] = torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
            inputs["pixel_values"] = pixels
            inputs["image_sizes"] = torch.tensor(sizes[:images])
            if whole:
                counts = [prompt.count("image") for prompt in prompts]
                inputs["batch_num_images"] = torch.tensor(counts)
        else:
            inputs["pixel_values"] = torch.randn(
                images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator
            )
    if videos:
        clips = [_clip(frames, generator) for _ in range(videos)]
        inputs["pixel_values_videos"] = torch.stack(clips)
    return inputs


def _clip(frames: int, generator: torch.Generator) -> torch.Tensor:
    """[frames, 3, H, W] in which parts of the picture stand still for a while."""
    clip = [torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)]
    patch = IMAGE_SIZE // GRID
    for _ in range(1, frames):
        again = torch.rand(GRID, GRID, generator=generator) < 0.4
        where = again.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        new = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        clip.append(torch.where(where, new, clip[-1]))
    return torch.stack(clip)


def single(
    inputs: dict[str, torch.Tensor], row: int, images: slice, videos: slice = slice(0, 0)
) -> dict[str, torch.Tensor]:
    """One row of a batch as a batch of one, padding removed."""
    real = inputs["attention_mask"][row] != 0
    out = {
        "input_ids": inputs["input_ids"][row : row + 1, real],
        "attention_mask": inputs["attention_mask"][row : row + 1, real],
    }
    for name in ("pixel_values", "image_sizes"):
        if name in inputs and images.start < images.stop:
            out[name] = inputs[name][images]
    if "batch_num_images" in inputs and images.start < images.stop:
        out["batch_num_images"] = inputs["batch_num_images"][row : row + 1]
    if videos.start < videos.stop:
        out["pixel_values_videos"] = inputs["pixel_values_videos"][videos]
    return out
