"""A small LLaVA-1.5 with random weights, its processor and a picture, all built in code.

Nothing is downloaded. The model has LLaVA-1.5's structure (CLIP tower with a class token and
24×24 patches of 14 pixels, features of the layer before the last, Llama decoder), so that every
method works on it as on the real one; its answers are noise. Its weights are scaled so that
patches go on resembling their picture from layer to layer: which patches look alike, which stand
out, is then real, though nothing is understood.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

GRID, PATCH = 24, 14
SIDE = GRID * PATCH
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant . The assistant "
    "gives helpful , detailed , and polite answers to the human ' s questions ."
)
QUESTION = "What is written on the sign , and how many birds are in the sky ?"
_WORDS = """
    the a an of to in on at by and or with is are was has it its this that there here one two three
    four five six seven eight nine ten many few red green blue white black yellow brown orange grey
    house tree trees sky cloud clouds sun lake water boat sail hill hills mountain road car wheel
    sign cafe bird birds grass door window roof chimney smoke picture photo shows seen left right
    middle above below near behind front large small old new quiet bright dark open closed open
    reads word letters written which who where when why how what yes no not only also very some
"""
_TEMPLATE = (
    SYSTEM + " {% for message in messages %}"
    "{% if message['role'] == 'user' %}USER : {% else %}ASSISTANT : {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Layers and widths of a model; heads have 16 channels or more."""

    vision_layers: int = 12
    vision_width: int = 64
    vision_mlp: int = 192
    vision_heads: int = 4
    text_layers: int = 16
    text_width: int = 96
    text_mlp: int = 224
    text_heads: int = 6
    key_heads: int = 3


#: a model of about 2 million parameters, deep enough for every method's layer schedule
SMALL = Size()


def vocabulary() -> dict[str, int]:
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER", "ASSISTANT", ":", "\n"]
    for word in [*SYSTEM.split(), *QUESTION.split(), *_WORDS.split()]:
        if word not in words:
            words.append(word)
    return {word: number for number, word in enumerate(words)}


def build(size: Size = SMALL, seed: int = 0, attention: str = "sdpa") -> Any:
    """A ``LlavaForConditionalGeneration`` in evaluation mode, float32."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vocab = vocabulary()
    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=size.vision_mlp,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=size.vision_width,
    )
    text = LlamaConfig(
        hidden_size=size.text_width,
        intermediate_size=size.text_mlp,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads,
        num_key_value_heads=size.key_heads,
        vocab_size=len(vocab),
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=vocab["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
    )
    config._attn_implementation = attention
    with torch.device("cpu"):
        model = LlavaForConditionalGeneration(config)
    _randomise(model, seed)
    return model.eval()


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights with unit gain; what blocks add to the residual stream stays smaller than it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "position_embedding" in name:
                p.copy_(0.08 * noise)
            elif "class_embedding" in name or "embed_tokens" in name:
                p.copy_(0.5 * noise)
            elif p.dim() >= 2:
                gain = 1.0
                if any(part in name for part in ("out_proj", "o_proj", "fc2", "down_proj")):
                    gain = 0.3
                elif "q_proj" in name:
                    gain = 1.7
                p.copy_(gain * noise / math.sqrt(p[0].numel()))
            elif "norm" in name or "layrnorm" in name:
                p.copy_(1 + 0.1 * noise if name.endswith("weight") else 0.05 * noise)
            else:
                p.copy_(0.05 * noise)


def processor(model: Any) -> Any:
    """A ``LlavaProcessor``: CLIP's image processing (no torchvision needed), a word per token."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(vocabulary(), unk_token="<unk>"))
    words.pre_tokenizer = Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=_TEMPLATE,
    )


def save(folder: Path, size: Size = SMALL, seed: int = 0) -> Path:
    """Write model (safetensors) and processor, to be read back by ``tokprune.load``."""
    model = build(size, seed)
    model.save_pretrained(folder)
    processor(model).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------ picture


def picture(width: int = 640, height: int = 480, seed: int = 3) -> Image.Image:
    """A café by a lake: sky, sun, birds, hills, a house, a tree, a boat, a car, a sign."""
    scale = 2
    w, h = scale * width, scale * height
    rng = random.Random(seed)
    image = Image.new("RGB", (w, h))
    draw = ImageDraw.Draw(image)

    def x(part: float) -> int:
        return round(part * w)

    def y(part: float) -> int:
        return round(part * h)

    for row in range(h):
        t = row / (0.62 * h)
        colour = (int(70 + 130 * min(t, 1)), int(130 + 80 * min(t, 1)), 226)
        draw.line((0, row, w, row), colour)
    draw.ellipse((x(0.73), y(0.07), x(0.73) + y(0.13), y(0.2)), (255, 232, 130))
    for cx, cy in ((0.27, 0.13), (0.5, 0.21)):
        for _ in range(9):
            dx, dy, r = (
                rng.uniform(-0.07, 0.07),
                rng.uniform(-0.015, 0.015),
                rng.uniform(0.02, 0.04),
            )
            draw.ellipse(
                (x(cx + dx - r), y(cy + dy - 0.7 * r), x(cx + dx + r), y(cy + dy + 0.7 * r)),
                (244, 247, 252),
            )
    for left, top, right, colour in (
        (-0.1, 0.34, 0.5, (104, 122, 148)),
        (0.3, 0.27, 1.0, (86, 104, 128)),
        (0.62, 0.38, 1.2, (112, 130, 150)),
    ):
        peak = (left + right) / 2
        draw.polygon([(x(left), y(0.6)), (x(peak), y(top)), (x(right), y(0.6))], colour)
        snow = 0.18 * (right - left) / 2
        draw.polygon(
            [
                (x(peak - snow), y(top + 0.18 * (0.6 - top))),
                (x(peak), y(top)),
                (x(peak + snow), y(top + 0.18 * (0.6 - top))),
                (x(peak), y(top + 0.1 * (0.6 - top))),
            ],
            (238, 242, 248),
        )
    draw.rectangle((0, y(0.58), w, y(0.76)), (58, 112, 160))
    for _ in range(70):
        cx, cy, length = rng.random(), rng.uniform(0.59, 0.755), rng.uniform(0.01, 0.05)
        draw.line((x(cx), y(cy), x(cx + length), y(cy)), (96, 150, 192), scale)
    draw.polygon(
        [(x(0.62), y(0.66)), (x(0.79), y(0.66)), (x(0.76), y(0.71)), (x(0.65), y(0.71))],
        (120, 62, 40),
    )
    draw.polygon([(x(0.7), y(0.42)), (x(0.7), y(0.645)), (x(0.785), y(0.645))], (246, 244, 236))
    draw.polygon([(x(0.692), y(0.46)), (x(0.692), y(0.645)), (x(0.63), y(0.645))], (214, 70, 60))
    draw.rectangle((0, y(0.76), w, h), (92, 142, 72))
    for _ in range(2600):
        cx, cy = rng.random(), rng.uniform(0.765, 1)
        shade = rng.randint(-26, 26)
        colour = (92 + shade, 142 + shade, 72 + shade // 2)
        draw.line((x(cx), y(cy), x(cx) + rng.randint(-3, 3), y(cy) - 9), colour, scale)
    draw.polygon([(0, y(0.93)), (w, y(0.86)), (w, y(0.97)), (0, h)], (112, 110, 108))
    for i in range(9):
        at = i / 9 + 0.03
        level = 0.965 - 0.05 * at
        draw.line((x(at), y(level), x(at + 0.05), y(level - 0.003)), (232, 226, 190), 3 * scale)

    # house with a roof, a door, two windows and a chimney
    draw.rectangle((x(0.30), y(0.34), x(0.33), y(0.46)), (120, 70, 58))
    draw.rectangle((x(0.17), y(0.5), x(0.4), y(0.84)), (206, 178, 138))
    draw.polygon([(x(0.14), y(0.51)), (x(0.285), y(0.36)), (x(0.43), y(0.51))], (148, 56, 46))
    draw.rectangle((x(0.26), y(0.68), x(0.31), y(0.84)), (92, 58, 40))
    for left in (0.185, 0.335):
        draw.rectangle((x(left), y(0.63), x(left + 0.05), y(0.73)), (152, 204, 226))
        draw.line((x(left + 0.025), y(0.63), x(left + 0.025), y(0.73)), (246, 244, 236), 2 * scale)
        draw.line((x(left), y(0.68), x(left + 0.05), y(0.68)), (246, 244, 236), 2 * scale)
    draw.rectangle((x(0.19), y(0.53), x(0.38), y(0.61)), (24, 60, 52))
    font = ImageFont.load_default(round(0.058 * h))
    draw.text((x(0.285), y(0.57)), "CAFE 24", (250, 236, 180), font, anchor="mm")

    # tree
    draw.rectangle((x(0.525), y(0.62), x(0.55), y(0.86)), (96, 66, 44))
    for _ in range(60):
        a, r = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.085)
        cx, cy = 0.537 + 0.8 * r * math.cos(a), 0.56 + 1.3 * r * math.sin(a)
        shade = rng.randint(-20, 20)
        draw.ellipse(
            (x(cx - 0.025), y(cy - 0.032), x(cx + 0.025), y(cy + 0.032)),
            (46 + shade, 104 + shade, 52 + shade // 2),
        )
    # car
    draw.rounded_rectangle((x(0.62), y(0.83), x(0.84), y(0.9)), 14 * scale, (226, 178, 40))
    draw.polygon(
        [(x(0.66), y(0.835)), (x(0.69), y(0.775)), (x(0.775), y(0.775)), (x(0.81), y(0.835))],
        (226, 178, 40),
    )
    draw.polygon(
        [(x(0.675), y(0.83)), (x(0.697), y(0.788)), (x(0.73), y(0.788)), (x(0.73), y(0.83))],
        (60, 84, 104),
    )
    draw.polygon(
        [(x(0.738), y(0.83)), (x(0.738), y(0.788)), (x(0.77), y(0.788)), (x(0.795), y(0.83))],
        (60, 84, 104),
    )
    for cx in (0.668, 0.79):
        for r, colour in ((0.026, (30, 30, 34)), (0.012, (176, 176, 182))):
            draw.ellipse(
                (x(cx) - y(r), y(0.9) - y(r), x(cx) + y(r), y(0.9) + y(r)), colour
            )  # fmt: skip
    # birds
    for cx, cy in ((0.42, 0.08), (0.47, 0.11), (0.6, 0.09), (0.66, 0.27)):
        for side in (-1, 1):
            draw.line(
                (x(cx), y(cy), x(cx + 0.02 * side), y(cy - 0.018)), (32, 36, 44), 3 * scale
            )  # fmt: skip
    image = image.filter(ImageFilter.GaussianBlur(0.6 * scale)).resize((width, height))
    grain = Image.effect_noise((width, height), 14).convert("RGB")
    return Image.blend(image, Image.blend(grain, image, 0.5), 0.12)
