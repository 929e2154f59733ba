"""Model folders with real processors, built in code: for loading and command-line tests."""

from __future__ import annotations

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
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A word per token; ids 0…2 and 99 as in :mod:`tiny`, 98 is unknown."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2}
    names = WORDS + [f"w{i}" for i in range(95 - len(WORDS))]
    vocab |= {word: 3 + i for i, word in enumerate(names)}
    vocab |= {"<unk>": 98, "<image>": tiny.IMAGE_TOKEN}
    words = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
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


def save(folder: Path, family: str = "llava", chat: bool = True, **changes: Any) -> Path:
    """Write a tiny model (``"llava"`` or ``"llava_next"``) and its processor to a folder."""
    model = tiny.BUILDERS[family](**changes)
    model.save_pretrained(folder)
    processor(model, chat).save_pretrained(folder)
    return folder
