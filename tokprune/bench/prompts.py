"""Prompts of a wanted length: one image and so many text tokens, the same in every batch row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokprune.bench.pictures import marks as marks_of
from tokprune.bench.pictures import moving, picture
from tokprune.families import family_of
from tokprune.inputs.pictures import read_picture
from tokprune.inputs.pixel_limits import check_shape
from tokprune.inputs.prompts import prompt_text

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
    """An image or a video as a model takes it: ``inputs`` (pixels, sizes, grids), which a batch
    repeats; its place in a prompt, ``ids`` [n] with the marks around and between its ``tokens``
    before any compression; ``marks``: what else a processor says of every token [n], 0 of text."""

    inputs: dict[str, Tensor]
    ids: Tensor
    tokens: int
    marks: dict[str, Tensor]


def encode(
    model: Any, image: Image.Image | None = None, processor: Any = None, frames: int = 0
) -> EncodedImage:
    """Pixels of ``image`` (None: :func:`default_image`) through a model's image processor.

    Args:
        model: a supported model.
        image: any mode; turned as its EXIF data say.
        processor: the model's own; None: CLIP's preprocessing at the tower's size, or what
            :mod:`tokprune.bench.pictures` knows.
        frames: 0, or the frames of a video that is made of the image (without a processor).

    Raises:
        ValueError: no processor, and a model that needs one; frames of a model for which
            :mod:`tokprune.bench.pictures` makes no videos, or with a processor.
    """
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 0 or frames == 1:
        raise ValueError(f"frames={frames!r} should be 0 for an image, or at least 2")
    if frames and processor is not None:
        raise ValueError(f"frames={frames} with a processor; videos are made without one")
    image = default_image() if image is None else read_picture(image, "image")
    family = family_of(model)
    parts = family.parts(model)
    if processor is not None:
        check_shape(processor, image, "image")
        text = prompt_text(processor, _FILLER)
        processed = processor(images=[image], text=[text], return_tensors="pt")
        ids = processed["input_ids"]
        visual = family.placeholders(parts, processed)[0] > 0
        first, last = visual.nonzero().view(-1)[[0, -1]].tolist()
        around = _around(processor.tokenizer)
        while first and int(ids[0, first - 1]) in around:
            first -= 1
        while last + 1 < ids.shape[1] and int(ids[0, last + 1]) in around:
            last += 1
        marks = {n: v[0, first : last + 1] for n, v in processed.items()
                 if v.shape == ids.shape and n not in ("input_ids", "attention_mask")}  # fmt: skip
        return EncodedImage(_inputs(processed), ids[0, first : last + 1], int(visual.sum()), marks)
    facts = family.facts(model, parts)
    if frames:
        inputs, listed = moving(model, family.name, image, frames)
        ids, video = torch.tensor(listed), model.config.video_token_id
        marks = marks_of(model, family.name, ids)
        return EncodedImage(inputs, ids, listed.count(video), marks)
    if facts.tower is None:
        inputs, listed = picture(model, family.name, image)
        ids = torch.tensor(listed)
        tokens = listed.count(parts.image_token_id)
        return EncodedImage(inputs, ids, tokens, marks_of(model, family.name, ids))
    own = _image_processor(model)
    check_shape(own, image, "image")
    inputs = _inputs(own(images=[image], return_tensors="pt"))
    layouts = family.images(parts, facts, inputs)
    assert isinstance(layouts, list)
    tokens = len(layouts[0].packed)
    return EncodedImage(inputs, torch.full((tokens,), parts.image_token_id), tokens, {})


def _inputs(processed: Any) -> dict[str, Tensor]:
    """What a processor says of images, not of tokens."""
    named = {n: torch.as_tensor(v) for n, v in processed.items() if n != "attention_mask"}
    ids = named.pop("input_ids", None)
    return {n: v for n, v in named.items() if ids is None or v.shape != ids.shape}


def _around(tokenizer: Any) -> set[int]:
    """Tokens that may stand around an image as a part of it: special ones, but those of texts."""
    text = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
            tokenizer.unk_token_id)  # fmt: skip
    return set(tokenizer.all_special_ids) - set(text)


def prompt(
    model: Any, encoded: EncodedImage, text_tokens: int, batch_size: int, tokenizer: Any = None
) -> dict[str, Tensor]:
    """Model inputs: ``batch_size`` equal rows of ``text_tokens`` and the image's tokens.

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
    length = text_tokens + len(encoded.ids)
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(
            f"text_tokens={text_tokens}: with the image's {encoded.tokens} tokens that is a "
            f"prompt of {length}; it should be at most the model's {limit} positions"
        )
    image = family_of(model).parts(model).image_token_id
    if tokenizer is None:
        # images and their marks are the last or among the last of a vocabulary; 0…2 are special
        generator = torch.Generator().manual_seed(1)
        high = min(image, int(encoded.ids.min()), config.vocab_size)
        text = torch.randint(min(3, high - 1), high, (text_tokens,), generator=generator)
    else:
        text = _words(tokenizer, text_tokens)
    before = min(PREFIX, text_tokens // 2)
    ids = torch.cat([text[:before], encoded.ids, text[before:]])
    marks = {n: F.pad(v, (before, text_tokens - before)) for n, v in encoded.marks.items()}
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **marks}
    return {
        **{n: v.expand(batch_size, -1).contiguous() for n, v in rows.items()},
        **{n: v.repeat(batch_size, *[1] * (v.dim() - 1)) for n, v in encoded.inputs.items()},
    }


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


def default_image(size: tuple[int, int] = (480, 640)) -> Image.Image:
    """Made in code: a sky, a field, discs of many sizes and colours, and grain; 640×480 pixels, or
    as much scaled to ``size`` (height, width)."""
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
    made = Image.blend(image, grain, 0.15)
    return made if size == (height, width) else made.resize((size[1], size[0]))
