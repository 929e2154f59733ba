"""A random LLaVA with a SigLIP tower, which has no class token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from tokprune.models import resolve

SIDE = 96


def make(folder: Path) -> Path:
    """The checkpoint in a folder, of 144 tokens an image."""
    shutil.copytree(resolve("mini"), folder)
    old = json.loads((folder / "config.json").read_text())
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2,
        image_size=SIDE, patch_size=8, vision_use_head=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**old["text_config"]), image_token_index=4,
        image_seq_length=144, vision_feature_select_strategy="full", vision_feature_layer=-2,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = "float32"
    config.save_pretrained(folder)
    weights = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if value.dim() > 1:
            value = value * 2
        for start, after in (
            ("model.vision_tower.", "vision_tower."),
            ("model.language_model.", "language_model.model."), ("model.", ""),
        ):  # fmt: skip
            if name.startswith(start):
                name = after + name.removeprefix(start)
                break
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1).replace(
            "vision_model.vision_model.", "vision_model."
        )
        weights[name] = value.contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for file in ("preprocessor_config.json", "processor_config.json"):
        own = json.loads((folder / file).read_text())
        images = own.get("image_processor", own)
        images |= {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        if file == "processor_config.json":
            own |= {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
        (folder / file).write_text(json.dumps(own))
    return folder
