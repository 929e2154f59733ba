"""Tiny Qwen-VL models in transformers and in OpenVINO GenAI, and a way to see what stays there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_processors
import numpy as np
import openvino
import openvino_genai
import optimum.exporters.openvino.model_configs as configs
import torch
import transformers
from openvino import opset13 as op
from optimum.exporters.openvino import main_export
from PIL import Image
from torch.nn.functional import normalize

import tokprune
from tokprune.engine.contracts import ImageTokens
from tokprune.methods import Method

#: pixels along each side of a visual token
CELL = 8
#: cells across the pictures whose kept tokens can be read, and text tokens before the image
ACROSS, BEFORE = 8, 3
#: id of the first word: those of :mod:`family_processors` before it have no text of their own
FIRST_WORD = 3
QUESTION = "what is in the picture ?"
IMAGE = 99


def save_and_convert(folder: Path, family: str) -> tuple[Path, Path]:
    """Folders of a tiny model for transformers and for OpenVINO GenAI."""
    source, made = folder / family, folder / f"{family}-openvino"
    source.mkdir()
    family_processors.save(source, family)
    limits = source / "preprocessor_config.json"
    told = json.loads(limits.read_text())
    least, most = CELL**2 * 4, CELL**2 * 400
    told |= {"size": {"shortest_edge": least, "longest_edge": most}}
    told |= {"min_pixels": least, "max_pixels": most}
    limits.write_text(json.dumps(told))
    for name, cls in vars(configs).items():
        if isinstance(cls, type) and name.startswith("DummyQwen") and "Vision" in name:
            cls.__init__ = _small(cls.__init__)  # type: ignore[misc]
    main_export(
        str(source), output=made, task="image-text-to-text", library_name="transformers",
        convert_tokenizer=True,
    )  # fmt: skip
    return source, made


def _small(init: Callable[..., None]) -> Callable[..., None]:
    """The converter's example image, whose 420 pixels are an odd number of our patches."""

    def made(self: Any, *given: Any, **options: Any) -> None:
        init(self, *given, **{**options, "height": 64, "width": 64})

    return made


def probe_of(folder: Path) -> Path:
    """The model with a decoder whose first answers are the words numbered as the kept cells: it
    adds to the logits of those that it finds in the positions."""
    made = folder.with_name(f"{folder.name}-probe")
    shutil.copytree(folder, made)
    file = "openvino_language_model.xml"
    model = openvino.Core().read_model(folder / file)
    (positions,) = (p for p in model.get_parameters() if "position_ids" in p.output(0).get_names())
    flat = np.array([-1], np.int64)
    time, row, column = (
        op.reshape(op.gather(positions, np.int64(axis), np.int64(0)), flat, False)
        for axis in range(3)
    )
    start = op.constant(np.array([BEFORE], np.int64))
    rows = op.multiply(op.subtract(row, start), np.int64(ACROSS))
    word = op.add(op.add(rows, op.subtract(column, start)), np.int64(FIRST_WORD))
    # all of an image stands at one time, at which no text does
    word = op.select(op.equal(time, start), word, op.constant(np.int64(-1)))
    word = op.reshape(word, np.array([-1, 1], np.int64), False)
    hit = op.convert(op.equal(word, op.constant(np.arange(100)[None])), "f32")
    found = op.multiply(op.reduce_max(hit, np.array([0], np.int64), False), np.float32(100))
    (result,) = model.get_results()
    logits = result.input_value(0)
    names, more = logits.get_names(), op.add(logits, found)
    result.input(0).replace_source_output(more.output(0))
    logits.get_tensor().set_names(set())
    more.output(0).get_tensor().set_names(names)
    openvino.save_model(model, made / file, compress_to_fp16=False)
    return made


def pipeline(folder: Path, attention: str = "PA") -> Any:
    return openvino_genai.VLMPipeline(
        str(folder), "CPU", ATTENTION_BACKEND=attention, INFERENCE_PRECISION_HINT="f32"
    )


def picture(seed: int, width: int, height: int) -> Any:
    """Pixels [height, width, 3] of blurred noise. Sides are whole cells, so nobody resizes it."""
    noise = np.random.default_rng(seed)
    small = noise.integers(0, 256, (height // CELL + 1, width // CELL + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def asked(pipe: Any, pixels: list[Any], beams: int = 1, **options: Any) -> Any:
    """The pipeline's answer of one token about pictures, with options of an export."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.apply_chat_template = 1, True, False
    config.num_beams = config.num_return_sequences = beams
    for name, value in options.items():
        setattr(config, name, value)
    images = "".join(f"<ov_genai_image_{i}>" for i in range(len(pixels)))
    return pipe.generate(
        f"user : {images} {QUESTION} assistant :",
        images=[openvino.Tensor(own[None].copy()) for own in pixels],
        generation_config=config,
    )


def prompt_length(pipe: Any, pixels: list[Any], **options: Any) -> int:
    return int(asked(pipe, pixels, **options).perf_metrics.get_num_input_tokens())


def kept_there(probe: Any, words: dict[str, int], pixels: Any, k: int, **options: Any) -> list[int]:
    """Cells that stay, of a picture ``ACROSS`` cells wide of which ``k`` do."""
    texts = asked(probe, [pixels], beams=k, **options).texts
    return sorted(words[text.strip()] - FIRST_WORD for text in texts)


class Here:
    """The same model in transformers."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.images = transformers.AutoImageProcessor.from_pretrained(folder)

    def inputs(self, pixels: Any) -> dict[str, Any]:
        made = self.images(images=Image.fromarray(pixels), return_tensors="pt")
        count = int(made["image_grid_thw"].prod()) // 4
        image = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"
        ids = self.tokenizer(f"user : {image} {QUESTION} assistant :")["input_ids"]
        ids = torch.tensor([ids])
        return {**made, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def kept(self, pixels: Any, method: Method) -> list[int]:
        """Cells that stay."""
        inputs = self.inputs(pixels)
        if transformers.__version__ >= "5":
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        with torch.no_grad(), tokprune.compress(self.model, method) as trace:
            self.model(**inputs)
        (image,) = trace.last.images
        return sorted((image.entered.column - image.columns[0]).tolist())

    def relevance(self, image: ImageTokens) -> torch.Tensor:
        """OpenVINO's: cosine with the mean embedding of the prompt's text."""
        text = f"user : {QUESTION} assistant :"
        ids = torch.tensor(self.tokenizer(text)["input_ids"])
        mean = self.model.get_input_embeddings()(ids).detach().mean(0)
        return normalize(image.features.float(), dim=-1) @ normalize(mean, dim=-1)
