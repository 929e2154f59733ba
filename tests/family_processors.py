"""Model folders of newer families with the files of their processors, built in code: tiny random
models, a word per token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_processor import WORDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tokprune.testing import tiny_family

_QWEN = {"<|image_pad|>": 99, "<|video_pad|>": 98, "<|vision_start|>": 97, "<|vision_end|>": 96}
_GRID = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.5, 0.4, 0.6], "image_std": [0.25, 0.2, 0.3], "resample": 3,
    "rescale_factor": 1 / 255, "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2,
    "size": {"shortest_edge": 256, "longest_edge": 2304}, "min_pixels": 256, "max_pixels": 2304,
}  # fmt: skip
_SQUARE = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3,
    "rescale_factor": 1 / 255,
}  # fmt: skip


def _template(image: str, video: str = "", begin: str = "") -> str:
    return (
        f"{begin}{{% for message in messages %}}{{{{ message['role'] }}}} : "
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}"
        f"{{% elif part['type'] == 'video' %}}{video}"
        "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    )


_QWEN_TEMPLATE = _template(
    "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
)

#: family → special tokens, names that the tokenizer has for them, files
_FAMILIES: dict[str, tuple[dict[str, int], dict[str, str], dict[str, Any]]] = {
    **{
        family: (_QWEN, {}, {
            "preprocessor_config.json": {
                **_GRID, "image_processor_type": "Qwen2VLImageProcessor",
            },
            "video_preprocessor_config.json": {
                **_GRID, "video_processor_type": f"{videos}VideoProcessor",
                "do_sample_frames": False,
            },
            "processor_config.json": {"processor_class": f"{kind}Processor"},
            "chat_template.jinja": _QWEN_TEMPLATE,
        })
        for family, kind, videos in (
            ("qwen2-vl", "Qwen2VL", "Qwen2VL"),
            ("qwen2.5-vl", "Qwen2_5_VL", "Qwen2VL"),
            ("qwen3-vl", "Qwen3VL", "Qwen3VL"),
        )
    },
    "gemma3": (
        {"<image_soft_token>": 99, "<start_of_image>": 90, "<end_of_image>": 91},
        {
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        {
            "preprocessor_config.json": {
                **_SQUARE, "image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 16,
                "size": {"height": 32, "width": 32},
            },
            "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 16},
            "chat_template.jinja": _template("<start_of_image>", begin="<s>"),
        },
    ),
    "internvl": (
        {"<IMG_CONTEXT>": 99, "<img>": 90, "</img>": 91, "<video>": 98},
        {
            "start_image_token": "<img>", "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
        },
        {
            "preprocessor_config.json": {
                **_SQUARE, "image_processor_type": "GotOcr2ImageProcessor",
                "size": {"height": 24, "width": 24}, "crop_to_patches": True, "min_patches": 1,
                "max_patches": 4,
            },
            "video_preprocessor_config.json": {
                **_SQUARE, "video_processor_type": "InternVLVideoProcessor",
                "size": {"height": 24, "width": 24}, "do_sample_frames": False,
            },
            "processor_config.json": {
                "processor_class": "InternVLProcessor", "image_seq_length": 9,
            },
            "chat_template.jinja": _template("<IMG_CONTEXT>\n", "<video>\n"),
        },
    ),
}  # fmt: skip

FAMILIES = tuple(_FAMILIES)
#: those that take videos
WITH_VIDEOS = tuple(family for family in FAMILIES if family != "gemma3")


def tokenizer(special: dict[str, int], names: dict[str, str]) -> PreTrainedTokenizerFast:
    """A word per token; the first free id that is left over is unknown."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **special}
    free = [n for n in range(3, 100) if n not in special.values()]
    words = [*WORDS, *(f"w{n}" for n in range(len(free) - 1 - len(WORDS)))]
    vocab |= {word: free[n] for n, word in enumerate(words)} | {"<unk>": free[-1]}
    made = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", padding_side="left", model_input_names=["input_ids", "attention_mask"],
        **({"extra_special_tokens": names} if names else {}),
    )  # fmt: skip


def save(folder: Path, family: str, more: Mapping[str, int] | None = None) -> Path:
    """Write a tiny model and the files of its processor; ``more``: tokens of its tokenizer."""
    special, names, files = _FAMILIES[family]
    tiny_family(family).build().save_pretrained(folder)
    tokenizer({**special, **(more or {})}, names).save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    told = {**json.loads(config.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(told))  # else it is read as the tokenizer of the family
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        (folder / name).write_text(text)
    return folder
