"""lmms-eval's classes for Qwen-VL, InternVL and Gemma 3 on tiny models: the classes and the
processors are genuine. Where they import packages that this environment lacks, these are stood in
for: torchvision by our video processor, ``qwen_vl_utils`` by the function below, ``av`` by an
empty module, since no films are read."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import family_processors
import pytest
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from tokprune.inputs.pixel_limits import limit_pixels
from tokprune.inputs.without_torchvision import load_without_torchvision

#: base → family, whether it has a chat class and a simple one, arguments that keep images small
_PIXELS = "min_pixels=256,max_pixels=6272"
BASES: dict[str, tuple[str, bool, bool, str]] = {
    "qwen2_vl": ("qwen2-vl", False, True, _PIXELS),
    "qwen2_5_vl": ("qwen2.5-vl", True, True, _PIXELS),
    "qwen3_vl": ("qwen3-vl", True, True, "min_pixels=4096,max_pixels=9216"),
    "qwen3_5": (
        "qwen3.5", True, True, "min_pixels=4096,max_pixels=9216,enable_thinking=False"
    ),
    "internvl_hf": ("internvl", True, False, "max_patches=4"),
    "gemma3": ("gemma3", False, True, ""),
}  # fmt: skip
CASES = [
    pytest.param(base, simple, id=f"{base}-{'simple' if simple else 'chat'}")
    for base, (_, chat, plain, _) in BASES.items()
    for simple, there in ((False, chat), (True, plain))
    if there
]


def start(home: Path, base: str) -> str:
    """What ``--model_args`` begin with."""
    family, _, _, more = BASES[base]
    return ",".join(filter(None, (f"base={base},pretrained={home / family}", more)))


def save(home: Path) -> Path:
    """A model folder for every family."""
    known = family_processors._FAMILIES
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(known, "qwen3.5", known["qwen3-vl"])  # they share a processor
        for family, *_ in BASES.values():
            family_processors.save(home / family, family)
    return home


def stand_in() -> Iterator[None]:
    """For packages that are missing, until resumed."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("av") is None:
            patch.setitem(sys.modules, "av", ModuleType("av"))
        torchvision = importlib.util.find_spec("torchvision") is not None
        for base in BASES:
            for kind in ("simple", "chat"):
                name = f"lmms_eval.models.{kind}.{base}"
                if importlib.util.find_spec(name) is None:
                    continue
                module = importlib.import_module(name)
                if not torchvision and hasattr(module, "AutoProcessor"):
                    patch.setattr(module, "AutoProcessor", _Processors)
                if vars(module).get("_has_qwen_vl") is False:
                    patch.setattr(module, "_has_qwen_vl", True)
                    patch.setattr(module, "process_vision_info", process_vision_info)
        yield


class _Processors:
    @staticmethod
    def from_pretrained(
        path: str, min_pixels: int | None = None, max_pixels: int | None = None, **hub: Any
    ) -> Any:
        try:
            return AutoProcessor.from_pretrained(path, **hub)
        except ImportError:
            made = load_without_torchvision(path, AutoConfig.from_pretrained(path), {})
        if "qwen" in Path(path).name:
            limit_pixels(made, min_pixels, max_pixels)
        return made


def process_vision_info(
    conversations: Any, return_video_kwargs: bool = False, return_video_metadata: bool = False,
    image_patch_size: int = 14,
) -> tuple[Any, ...]:  # fmt: skip
    """As in qwen_vl_utils 0.0.14, for images."""
    parts = [
        part
        for conversation in conversations
        for message in conversation
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]
    images = [_resized(part, 2 * image_patch_size) for part in parts] or None
    options = {"do_sample_frames": False} | ({} if return_video_metadata else {"fps": []})
    return (images, None, options) if return_video_kwargs else (images, None)


def _resized(part: dict[str, Any], cell: int) -> Image.Image:
    image = part["image"]
    if isinstance(image, str):
        image = Image.open(io.BytesIO(base64.b64decode(image.split("base64,", 1)[1])))
    width, height = image.size
    down, across = (max(cell, round(side / cell) * cell) for side in (height, width))
    least, most = part.get("min_pixels", 4 * cell**2), part.get("max_pixels", 16384 * cell**2)
    if down * across > most:
        factor = math.sqrt(height * width / most)
        down, across = (math.floor(side / factor / cell) * cell for side in (height, width))
    elif down * across < least:
        factor = math.sqrt(least / (height * width))
        down, across = (math.ceil(side * factor / cell) * cell for side in (height, width))
    return image.convert("RGB").resize((across, down))
