"""A random Qwen2.5-VL, in sizes that vLLM has kernels for, and the files of its processor."""

from __future__ import annotations

from pathlib import Path

import family_processors
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

#: pixels along the edge of a token
CELL = 8


def make(folder: Path) -> Path:
    """The checkpoint in a folder."""
    family_processors.save(folder, "qwen2.5-vl")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "max_position_embeddings": 4096, "rope_parameters": rope, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
        "fullatt_block_indexes": [1, 3], "out_hidden_size": 128, "tokens_per_second": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=99, video_token_id=98,
        vision_start_token_id=97, vision_end_token_id=96, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:  # larger than usual, so that answers differ
                value.mul_(4.0 if "lm_head" in name else 2.0)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    model.save_pretrained(folder)
    return folder
