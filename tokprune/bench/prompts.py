"""Prompts of a wanted length: one image and so many text tokens, the same in every batch row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokprune.families import family_of

if TYPE_CHECKING:
    from PIL import Image

#: text tokens before the image, at most (LLaVA-1.5's system prompt has about as many)
PREFIX = 35
_FILLER = (
    "Look at the image and describe in detail what can be seen: the people, animals and things "
    "in it, where they are, which colours they have, what is written on signs and labels, and "
    "what seems to be going on. "
)


@dataclass(frozen=True)
class EncodedImage:
    """An image as a model takes it: ``pixels`` [1, …], ``sizes`` [1, 2] (height, width) for tiled
    models, ``tokens`` in the prompt before any compression."""

    pixels: Tensor
    sizes: Tensor | None
    tokens: int


def encode(model: Any, image: Image.Image | None = None, processor: Any = None) -> EncodedImage:
    """Pixels of ``image`` (None: :func:`default_image`) through a model's image processor.

    Args:
        model: a supported model.
        image: any mode.
        processor: the model's own; None: CLIP's preprocessing at the tower's size.
    """
    image = default_image() if image is None else image.convert("RGB")
    images = _image_processor(model) if processor is None else processor.image_processor
    processed = images(images=[image], return_tensors="pt")
    sizes = processed.get("image_sizes")
    if sizes is not None:
        sizes = torch.as_tensor(sizes)
    family = family_of(model)
    parts = family.parts(model)
    layouts = family.layouts(parts, processed["pixel_values"], sizes, family.facts(model, parts))
    return EncodedImage(processed["pixel_values"], sizes, len(layouts[0].packed))


def prompt(
    model: Any, encoded: EncodedImage, text_tokens: int, batch_size: int, tokenizer: Any = None
) -> dict[str, Tensor]:
    """Model inputs: ``batch_size`` equal rows of ``text_tokens`` + ``encoded.tokens`` tokens.

    Args:
        model: for its vocabulary and image token.
        encoded: of :func:`encode`.
        text_tokens: at least 2: the image stands inside the text.
        batch_size: rows.
        tokenizer: makes the text (None: random tokens; what they say does not matter for time
            unless a method's token count depends on it).

    Raises:
        ValueError: a number out of range, or a prompt longer than the model's positions.
    """
    if text_tokens < 2:
        raise ValueError(f"text_tokens={text_tokens} should be at least 2")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} should be at least 1")
    length = text_tokens + encoded.tokens
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(
            f"text_tokens={text_tokens}: with the image's {encoded.tokens} tokens that is a "
            f"prompt of {length}; it should be at most the model's {limit} positions"
        )
    image = family_of(model).parts(model).image_token_id
    if tokenizer is None:
        # the image token is the last or one of the last of its vocabulary; 0…2 are special
        generator = torch.Generator().manual_seed(1)
        high = min(image, config.vocab_size)
        text = torch.randint(min(3, high - 1), high, (text_tokens,), generator=generator)
    else:
        text = _words(tokenizer, text_tokens)
    before = min(PREFIX, text_tokens // 2)
    block = torch.full((encoded.tokens,), image)
    ids = torch.cat([text[:before], block, text[before:]]).expand(batch_size, -1).contiguous()
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": encoded.pixels.repeat(batch_size, *[1] * (encoded.pixels.dim() - 1)),
    }
    if encoded.sizes is not None:
        inputs["image_sizes"] = encoded.sizes.repeat(batch_size, 1)
    return inputs


def _words(tokenizer: Any, count: int) -> Tensor:
    words = tokenizer(_FILLER, add_special_tokens=False)["input_ids"]
    return torch.tensor((words * (count // len(words) + 1))[:count])


def _image_processor(model: Any) -> Any:
    from transformers import CLIPImageProcessor, LlavaNextImageProcessor

    side = model.config.vision_config.image_size
    pixels: dict[str, Any] = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    pinpoints = getattr(model.config, "image_grid_pinpoints", None)
    if pinpoints is None:
        return CLIPImageProcessor(**pixels)
    return LlavaNextImageProcessor(image_grid_pinpoints=pinpoints, **pixels)


def default_image() -> Image.Image:
    """640×480, made in code: a sky, a field, discs of many sizes and colours, and grain."""
    import random

    from PIL import Image, ImageDraw

    width, height = 640, 480
    rng = random.Random(7)
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for y in range(height):
        part = y / height
        colour = (int(80 + 120 * part), int(140 + 60 * part), 230) if part < 0.6 else (90, 140, 70)
        draw.line((0, y, width, y), colour)
    for _ in range(40):
        x, y, r = rng.randrange(width), rng.randrange(height), rng.randrange(5, 50)
        draw.ellipse((x - r, y - r, x + r, y + r), tuple(rng.randrange(256) for _ in range(3)))
    grain = Image.effect_noise((width, height), 40).convert("RGB")
    return Image.blend(image, grain, 0.15)
