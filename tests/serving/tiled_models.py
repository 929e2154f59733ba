"""Models that cut images into tiles: the weights of the embedded one, and a newline embedding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tokprune.models import resolve

#: (height, width) of the crops put together, in pixels: wide, tall, square
PLACES = [[192, 384], [384, 192], [384, 384]]
#: of which LLaVA-OneVision shrinks what shows the image to the cells of nine crops
LARGE = [768, 768]
CLASSES = {
    "llava_next": ("LlavaNextForConditionalGeneration", "LlavaNext"),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", "LlavaOnevision"),
}


def make(kind: str, folder: Path) -> Path:
    """A checkpoint of a ``model_type`` in a folder."""
    architecture, name = CLASSES[kind]
    places = [*PLACES, LARGE] if kind == "llava_onevision" else PLACES
    shutil.copytree(resolve("mini"), folder)
    more: dict[str, Any] = {
        "architectures": [architecture], "model_type": kind, "image_grid_pinpoints": places,
        "dtype": "float32",
    }  # fmt: skip
    if kind == "llava_onevision":
        more |= {"vision_aspect_ratio": "anyres_max_9", "video_token_index": 143}
    config = {**_read(folder / "config.json"), **more}
    config["text_config"]["max_position_embeddings"] = 8192
    _write(folder / "config.json", config)
    images = {
        **_read(folder / "preprocessor_config.json"), "image_grid_pinpoints": places,
        "image_processor_type": f"{name}ImageProcessor", "do_pad": True,
        "size": {"height": 192, "width": 192} if kind == "llava_onevision"
        else {"shortest_edge": 192},
    }  # fmt: skip
    _write(folder / "preprocessor_config.json", images)
    processor = {**_read(folder / "processor_config.json"), "processor_class": f"{name}Processor"}
    del processor["image_processor"]
    if kind == "llava_onevision":
        del processor["num_additional_image_tokens"], processor["patch_size"]
        processor |= {"num_image_tokens": 577, "vision_aspect_ratio": "anyres_max_9"}
        video = {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": images["size"]}
        _write(folder / "video_preprocessor_config.json", video)
    _write(folder / "processor_config.json", processor)
    weights = load_file(folder / "model.safetensors")
    newline = torch.randn(192, generator=torch.Generator().manual_seed(0))
    save_file({**weights, "image_newline": newline.half()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    return folder


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
