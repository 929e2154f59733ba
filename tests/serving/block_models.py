"""Random InternVL and Gemma 3, in sizes that vLLM has kernels for, with files of processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import family_processors
import torch
import transformers

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


MODELS = {"internvl": internvl}


def make(kind: str, folder: Path) -> Path:
    """The checkpoint of a family in a folder."""
    family_processors.save(folder, kind)
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:  # larger than usual, so that answers differ
                value.mul_(4.0 if "lm_head" in name else 2.0)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    model.save_pretrained(folder)
    return folder
