"""Model folders with real processors, built in code: for loading and command-line tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = ["user", "assistant", "what", "is", "in", "the", "picture", "how", "many", "are", "there",
         ":", "?", ".", "a", "house", "lake", "sun"]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<{{ part['type'] }}>\n{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer(videos: bool = False) -> PreTrainedTokenizerFast:
    """A word per token; ids 0…2 and 99 as in :mod:`tiny`, and 98 where there are videos; the last
    but those is unknown."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2}
    names = WORDS + [f"w{i}" for i in range(95 - videos - len(WORDS))]
    vocab |= {word: 3 + i for i, word in enumerate(names)}
    vocab |= {"<unk>": 98 - videos, "<image>": tiny.IMAGE_TOKEN}
    if videos:
        vocab["<video>"] = tiny.VIDEO_TOKEN
    words = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<video>"] if videos else ["<image>"],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def processor(model: Any, chat: bool = True) -> Any:
    """The processor of a tiny model (no torchvision needed)."""
    tiled = hasattr(model.config, "image_grid_pinpoints")
    side = tiny.IMAGE_SIZE
    pixels: dict[str, Any] = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    options: dict[str, Any] = {
        "patch_size": side // tiny.GRID,
        "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(
            model.config.vision_feature_select_strategy == "default"
        ),
        "image_token": "<image>",
        "chat_template": TEMPLATE if chat else None,
    }
    if tiled:
        images = LlavaNextImageProcessor(
            image_grid_pinpoints=model.config.image_grid_pinpoints, **pixels
        )
        return LlavaNextProcessor(images, tokenizer(), **options)
    return LlavaProcessor(CLIPImageProcessor(**pixels), tokenizer(), **options)


def save_video(folder: Path, family: str, old: bool = False, **changes: Any) -> Path:
    """Write a tiny model that takes videos (``"llava_next_video"``, ``"llava_onevision"``) and the
    files of its processor, as transformers 5 writes them or (``old``) as 4.5x did."""
    model = tiny.VIDEO_BUILDERS[family](**changes)
    model.save_pretrained(folder)
    tokenizer(videos=True).save_pretrained(folder)
    side = tiny.IMAGE_SIZE
    tall, square = {"shortest_edge": side}, {"height": side, "width": side}
    next_video = family == "llava_next_video"
    shared = {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.5, 0.4, 0.6], "image_std": [0.25, 0.2, 0.3], "resample": 3,
        "rescale_factor": 1 / 255, "size": tall if next_video else square,
    }  # fmt: skip
    if next_video:
        shared |= {"crop_size": square, "do_center_crop": True}
    kind = "LlavaNextVideo" if next_video else "LlavaOnevision"
    images = {
        **shared, "image_grid_pinpoints": model.config.image_grid_pinpoints, "do_pad": True,
        "image_processor_type": f"{kind.removesuffix('Video')}ImageProcessor",
    }  # fmt: skip
    videos = {**shared, "video_processor_type": f"{kind}VideoProcessor", "do_sample_frames": False}
    strategy = model.config.vision_feature_select_strategy
    told: dict[str, Any] = {
        "processor_class": f"{kind}Processor", "image_token": "<image>", "video_token": "<video>",
        "vision_feature_select_strategy": strategy,
    }  # fmt: skip
    if next_video:
        told |= {"patch_size": side // tiny.GRID, "num_additional_image_tokens": 1}
    else:
        told |= {"num_image_tokens": tiny.PATCHES, "vision_aspect_ratio": "anyres_max_9"}
    files: dict[str, Any] = {"processor_config.json": told}
    if old:
        files |= {
            "preprocessor_config.json": images,
            "video_preprocessor_config.json": videos,
            "chat_template.json": {"chat_template": TEMPLATE},
        }  # fmt: skip
    else:
        told |= {"image_processor": images, "video_processor": videos}
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def save(folder: Path, family: str = "llava", chat: bool = True, **changes: Any) -> Path:
    """Write a tiny model (``"llava"`` or ``"llava_next"``) and its processor to a folder."""
    model = tiny.BUILDERS[family](**changes)
    model.save_pretrained(folder)
    processor(model, chat).save_pretrained(folder)
    return folder
