"""The models of published tables, and how to tell that a model of yours is one of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath


@dataclass(frozen=True)
class Model:
    """``supported``: one that tokprune can load; ``hub``: where its weights are; ``aliases``:
    other names of the same weights, normalised."""

    name: str
    label: str
    supported: bool = False
    hub: str | None = None
    aliases: tuple[str, ...] = ()


_KNOWN = (
    Model("llava-1.5-7b", "LLaVA-1.5-7B", True, "llava-hf/llava-1.5-7b-hf", ("llava-v1.5-7b",)),
    Model("llava-1.5-13b", "LLaVA-1.5-13B", True, "llava-hf/llava-1.5-13b-hf",
          ("llava-v1.5-13b",)),
    Model("llava-1.5-13b-4bit", "LLaVA-1.5-13B, 4 bit"),
    Model("llava-next-7b", "LLaVA-NeXT-7B (Vicuna)", True, "llava-hf/llava-v1.6-vicuna-7b-hf",
          ("llava-v1.6-vicuna-7b", "llava-1.6-vicuna-7b", "llava-1.6-7b", "llava-v1.6-7b")),
    Model("llava-next-13b", "LLaVA-NeXT-13B (Vicuna)", True,
          "llava-hf/llava-v1.6-vicuna-13b-hf",
          ("llava-v1.6-vicuna-13b", "llava-1.6-vicuna-13b", "llava-1.6-13b", "llava-v1.6-13b")),
    Model("llava-1.5-7b-m3", "LLaVA-1.5-7B-M3"),
    Model("llava-next-7b-m3", "LLaVA-NeXT-7B-M3"),
    Model("llava-next-video-7b", "LLaVA-NeXT-Video-7B"),
    Model("llava-video-7b", "LLaVA-Video"),
    Model("video-llava-7b", "Video-LLaVA-7B"),
    Model("qwen2-vl-7b", "Qwen2-VL-7B"),
    Model("qwen2.5-vl-7b", "Qwen2.5-VL-7B"),
    Model("qwen3-vl-8b", "Qwen3-VL-8B"),
    Model("internvl2-8b", "InternVL2-8B"),
    Model("glamm", "GLaMM"),
    Model("clip-vit-b-32", "CLIP ViT-B/32"), Model("clip-vit-b-16", "CLIP ViT-B/16"),
    Model("clip-vit-l", "CLIP-L"), Model("blip", "BLIP"), Model("blip-2", "BLIP-2"),
    Model("deit-s", "DeiT-S"), Model("mae-l", "MAE-L"), Model("mae-h", "MAE-H"),
    Model("vit-s-16", "ViT-S/16"), Model("vit-b-16", "ViT-B/16"), Model("vit-l-16", "ViT-L/16"),
    Model("vit-l-16-384", "ViT-L/16@384"), Model("swag-b-384", "SWAG B@384"),
    Model("swag-l-512", "SWAG L@512"), Model("swag-h-518", "SWAG H@518"),
)  # fmt: skip

#: by name
MODELS: Mapping[str, Model] = {m.name: m for m in _KNOWN}


def model_key(name: str) -> str:
    """The ledger's name of a model: ``llava-hf/llava-1.5-7b-hf``, a folder of that name and
    ``LLaVA-1.5-7B`` all give ``llava-1.5-7b``. Other models give their own name, normalised."""
    plain = re.sub(r"[\s_]+", "-", PurePath(name.strip()).name.lower())
    plain = plain.removesuffix("-hf")
    for model in _KNOWN:
        if plain in (model.name, *model.aliases):
            return model.name
    return plain
