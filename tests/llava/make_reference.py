#!/usr/bin/env python3
"""What transformers' own LLaVA classes do, for the tests of the original package to compare with.

    python tests/llava/make_reference.py FOLDER

Runs in an environment with a transformers that tokprune supports directly. Writes, per tiny
random model, its weights under the names of the original package, the inputs, and what every
method kept and answered.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny
from methods_table import ALL, CORE

import tokprune
from tokprune.testing.oracle import compressed_logits, continuation_tokens

STEPS = 4
#: (height, width); at these, both packages crop the padding of the stitched picture at the same
#: rows
SIZES = [(14, 40), (40, 14), (30, 22)]
#: a size at which they do not
ROUNDING = (55, 22)
PROMPTS: dict[str, list[list[Any]]] = {
    "one": [[4, "image", 6]],
    "ragged": [[4, "image", 6], [7, "image", 3, "image", 9]],
}
SHARED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT = (*SHARED, "num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps")
VISION = (*SHARED, "image_size", "patch_size", "hidden_act", "layer_norm_eps")
#: name → (builder, its options, cases)
MODELS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "square": (tiny.llava, {}, ALL),
    "anyres": (tiny.llava_next, {}, ALL),
    "anyres-mistral": (tiny.llava_next, {"decoder": "mistral"}, CORE),
}


def original_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under the original package's names."""
    renamed = {}
    for name, value in weights.items():
        name = name.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.0.")
        name = name.replace("model.multi_modal_projector.linear_2.", "model.mm_projector.2.")
        name = name.replace("model.language_model.", "model.")
        if name.startswith("model.vision_tower."):
            rest = name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
            name = f"model.vision_tower.vision_tower.vision_model.{rest}"
        renamed[name] = value.clone().contiguous()
    return renamed


@torch.no_grad()
def outcome(model: Any, inputs: Any, method: str, options: Any) -> dict[str, torch.Tensor]:
    """Logits [B, 1 + steps, V], and per decoder layer the prompt columns [B, L] it worked on."""
    continuation = continuation_tokens(len(inputs["input_ids"]), STEPS)
    with tokprune.compress(model, method, **options) as trace:
        logits = compressed_logits(model, inputs, continuation)
    assert trace.last is not None
    columns = {f"layer{n}": layer.column for n, layer in enumerate(trace.last.layers)}
    return {"logits": logits, **columns}


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, (build, options, cases) in MODELS.items():
        target = folder / name
        target.mkdir(parents=True)
        model = build(**options)
        save_file(original_names(model.state_dict()), target / "model.safetensors")
        tensors: dict[str, torch.Tensor] = {}
        for prompt, rows in PROMPTS.items():
            images = sum(part == "image" for row in rows for part in row)
            inputs = tiny.make_inputs(model, rows, SIZES[:images])
            tensors.update({f"{prompt}/inputs/{k}": v for k, v in inputs.items()})
            for case, (method, given) in cases.items():
                for key, value in outcome(model, inputs, method, given).items():
                    tensors[f"{prompt}/{case}/{key}"] = value.clone()
        save_file(tensors, target / "cases.safetensors")
        (target / "config.json").write_text(
            json.dumps(
                {
                    "decoder": options.get("decoder", "llama"),
                    "text": {k: getattr(model.config.text_config, k) for k in TEXT},
                    "vision": {k: getattr(model.config.vision_config, k) for k in VISION},
                    "pinpoints": getattr(model.config, "image_grid_pinpoints", None),
                    "image_token": tiny.IMAGE_TOKEN,
                    "cases": cases,
                    "prompts": list(PROMPTS),
                    "steps": STEPS,
                    "rounding": {"size": ROUNDING, "tokens": tiny.tokens_of(model, ROUNDING)},
                }
            )
        )
    print(f"reference of {len(MODELS)} models: {folder}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
