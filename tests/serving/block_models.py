"""Random InternVL and Gemma 3, in sizes that vLLM has kernels for, with files of processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import family_processors
import torch
import transformers
from safetensors.torch import load_file, save_file

DECODER = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100, "max_position_embeddings": 4096,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip


def internvl() -> Any:
    """Tiles of 24×24 pixels and 9 tokens."""
    vision = transformers.InternVLVisionConfig(**VISION, image_size=[24, 24], patch_size=[4, 4])
    text = transformers.Qwen3Config(**DECODER, architectures=["Qwen3ForCausalLM"])
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=99, image_seq_length=9,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.InternVLForConditionalGeneration(config)


def gemma3() -> Any:
    """Images of 32×32 pixels and 16 tokens; every other layer sees 24 tokens back."""
    vision = transformers.SiglipVisionConfig(
        **VISION, image_size=32, patch_size=4, vision_use_head=False
    )
    text = transformers.Gemma3TextConfig(
        **DECODER, sliding_window=24, layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=32,
    )  # fmt: skip
    config = transformers.Gemma3Config(
        vision_config=vision, text_config=text, mm_tokens_per_image=16, boi_token_index=90,
        eoi_token_index=91, image_token_index=99, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


MODELS = {"internvl": internvl, "gemma3": gemma3}
#: tokens of line breaks, which vLLM looks for and joins, and of what keeps them apart
BREAKS = {"\n": 92, "\n\n": 93, "\n\n\n": 94, "\n\n\n\n": 95, " ": 96}


def make(kind: str, folder: Path) -> Path:
    """The checkpoint of a family in a folder."""
    family_processors.save(folder, kind, BREAKS if kind == "gemma3" else None)
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:  # larger than usual, so that answers differ
                value.mul_(4.0 if "lm_head" in name else 2.0)
            if "mm_input_projection" in name:
                value.normal_(std=0.1)  # transformers starts from zeros
    for old in folder.glob("*.safetensors"):
        old.unlink()
    model.save_pretrained(folder)
    if kind == "gemma3":  # the names of released checkpoints, the only ones that vLLM knows
        file, tower = folder / "model.safetensors", "vision_tower."
        weights = {
            f"{tower}vision_model.{name.removeprefix(tower)}" if name.startswith(tower) else name:
            value for name, value in load_file(file).items()
        }  # fmt: skip
        save_file(weights, file, {"format": "pt"})
    return folder
