"""Random models of Qwen, in sizes that vLLM has kernels for, with files of processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import family_processors
import torch
import transformers
from safetensors.torch import load_file, save_file

#: pixels along the edge of a token
CELL = 8
CLASSES = {
    "qwen2-vl": "Qwen2VLForConditionalGeneration",
    "qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3-vl": "Qwen3VLForConditionalGeneration",
    "qwen3-vl-moe": "Qwen3VLMoeForConditionalGeneration",
}


def make(kind: str, folder: Path) -> Path:
    """The checkpoint of a family in a folder."""
    family_processors.save(folder, kind.removesuffix("-moe"))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text: dict[str, Any] = {
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
    elif kind.startswith("qwen3"):
        text |= {"head_dim": 32, "rope_parameters": {**rope, "mrope_interleaved": True}}
        vision |= {
            "hidden_size": 64, "intermediate_size": 128, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 2], "out_hidden_size": 128,
        }  # fmt: skip
        if kind == "qwen3-vl-moe":
            text |= {
                "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                "norm_topk_prob": True,
            }  # fmt: skip
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
    if kind == "qwen3-vl-moe":
        _as_released(folder / "model.safetensors")
    return folder


def _as_released(file: Path) -> None:
    """Experts as they stand in the released checkpoints, the only way that vLLM reads them."""
    weights = load_file(file)
    for name, value in weights.items():
        if ".experts." in name:
            weights[name] = value.transpose(1, 2).contiguous()
    save_file(weights, file, {"format": "pt"})
