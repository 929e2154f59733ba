"""Random Qwen2-VL and Qwen2.5-VL, in sizes that vLLM has kernels for, with files of processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import family_processors
import torch
import transformers

#: pixels along the edge of a token
CELL = 8
CLASSES = {
    "qwen2-vl": "Qwen2VLForConditionalGeneration",
    "qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
}


def make(kind: str, folder: Path) -> Path:
    """The checkpoint of a family in a folder."""
    family_processors.save(folder, kind)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "max_position_embeddings": 4096, "rope_parameters": rope, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    vision: dict[str, Any] = {
        "depth": 4, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }  # fmt: skip
    if kind == "qwen2-vl":
        vision |= {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}
    else:
        vision |= {
            "hidden_size": 64, "intermediate_size": 128, "window_size": 16, "tokens_per_second": 2,
            "fullatt_block_indexes": [1, 3], "out_hidden_size": 128,
        }  # fmt: skip
    name = CLASSES[kind].removesuffix("ForConditionalGeneration")
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, image_token_id=99, video_token_id=98,
        vision_start_token_id=97, vision_end_token_id=96, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[kind])(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:  # larger than usual, so that answers differ
                value.mul_(4.0 if "lm_head" in name else 2.0)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    model.save_pretrained(folder)
    return folder
